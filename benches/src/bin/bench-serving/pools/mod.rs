//! Where blocks of KV come from: four pools behind one trait.

pub mod elastic;
pub mod ideal;
pub mod page_at_a_time;
pub mod static_split;

use anyhow::Result;

/// Tokens in a block.
pub const BLOCK_TOKENS: u32 = 16;
/// Bytes of KV of a token: 32 layers, K and V, 8 heads of 128 elements of 2 bytes.
pub const TOKEN_BYTES: usize = 131_072;
/// Bytes of a block: one page of 2 MiB.
pub const BLOCK_BYTES: usize = BLOCK_TOKENS as usize * TOKEN_BYTES;

/// Blocks that so many tokens take.
pub fn blocks_of(tokens: u32) -> usize {
    tokens.div_ceil(BLOCK_TOKENS) as usize
}

/// Whole blocks in a budget of so many tokens.
pub fn blocks_within(tokens: usize) -> usize {
    tokens / BLOCK_TOKENS as usize
}

/// A pool of blocks for several models.
///
/// Calls are made by the thread that takes the models' steps, at a moment of simulated time, and move it forward by what they
/// cost that thread.
pub trait Memory {
    /// The most blocks that a model can have, if no other has any.
    fn most_blocks(&self, model: usize) -> usize;

    /// How many blocks a model can have more now.
    fn free_blocks(&self, model: usize) -> usize;

    /// Takes `count` blocks for a model and puts their numbers at the end of `blocks`; none of them, and false, if they cannot
    /// be had.
    ///
    /// # Errors
    /// If the driver refuses what must succeed.
    fn take(
        &mut self,
        now_ns: &mut u64,
        model: usize,
        count: usize,
        blocks: &mut Vec<u32>,
    ) -> Result<bool>;

    /// Gives back blocks of a model, of which the device is past.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    fn give(&mut self, now_ns: &mut u64, model: usize, blocks: &mut Vec<u32>) -> Result<()>;

    /// Has what works in the background begin at a moment, while a step is on the GPU.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    fn work(&mut self, now_ns: u64) -> Result<()> {
        let _ = now_ns;
        Ok(())
    }

    /// What a model holds of the card now, in bytes, whether it uses it or not.
    fn held_bytes(&self, model: usize) -> u64;

    /// Calls so far on the stepping thread that change memory or how it is mapped.
    fn memory_calls(&self) -> u64 {
        0
    }
}
