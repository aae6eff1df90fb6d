//! Where blocks of KV come from.

use anyhow::{Result, ensure};
use cuda_vmm::VirtualMemoryPool;

pub const BLOCK_TOKENS: u32 = 16;
/// Bytes of KV of a token of an 8B model: 32 layers, K and V, 8 heads of 128 elements of 2 bytes.
pub const TOKEN_BYTES: usize = 131_072;
/// Bytes of a block: one page of 2 MiB.
pub const BLOCK_BYTES: usize = BLOCK_TOKENS as usize * TOKEN_BYTES;

/// Blocks that this many tokens take.
pub fn blocks_of(tokens: u32) -> usize {
    tokens.div_ceil(BLOCK_TOKENS) as usize
}

/// Whole blocks in a budget of this many tokens.
pub fn blocks_within(tokens: usize) -> usize {
    tokens / BLOCK_TOKENS as usize
}

/// Neighbours among rising numbers of blocks, as offset and length in bytes.
pub fn runs(blocks: &[u32]) -> Vec<(usize, usize)> {
    let runs = blocks.chunk_by(|one, next| one + 1 == *next);
    runs.map(|run| (run[0] as usize * BLOCK_BYTES, run.len() * BLOCK_BYTES))
        .collect()
}

/// Allocates runs of a range; false, and none of them, if there is no memory for all.
pub fn allocate_runs(range: &VirtualMemoryPool, runs: &[(usize, usize)]) -> Result<bool> {
    for (done, (offset, bytes)) in runs.iter().enumerate() {
        if let Err(error) = range.allocate(*offset, *bytes) {
            range.deallocate_many(&runs[..done])?;
            ensure!(error.is_out_of_memory(), error);
            return Ok(false);
        }
    }
    Ok(true)
}

/// A pool of blocks for several models, on a GPU that runs their steps.
///
/// The thread that takes the models' steps makes the calls, at a moment in nanoseconds, and moves
/// it forward by what they cost that thread. Calls fail if the driver refuses what must succeed.
pub trait Memory {
    /// The most blocks that a model can have, if no other has any.
    fn most_blocks(&self, model: usize) -> usize;

    /// How many blocks a model can have more now.
    fn free_blocks(&self, model: usize) -> usize;

    /// Takes `count` blocks for a model; `None` if they cannot be had.
    fn take(&mut self, now_ns: &mut u64, model: usize, count: usize) -> Result<Option<Vec<u32>>>;

    /// Gives back blocks of a model, which the device uses no more.
    fn give(&mut self, now_ns: &mut u64, model: usize, blocks: Vec<u32>) -> Result<()>;

    /// Lets the background work begin at a moment, while a step is on the GPU.
    fn work(&mut self, _now_ns: u64) -> Result<()> {
        Ok(())
    }

    /// Runs a step that takes this long on the GPU.
    fn step(&mut self, now_ns: &mut u64, time_ns: u64) -> Result<()> {
        self.idle(now_ns, time_ns)
    }

    /// Lets at most this much time go by.
    fn idle(&mut self, now_ns: &mut u64, time_ns: u64) -> Result<()> {
        self.work(*now_ns)?;
        *now_ns += time_ns;
        Ok(())
    }

    /// Has the background give back what an idle model holds beside its live blocks, if it can.
    fn go_idle(&mut self, _now_ns: u64, _model: usize) -> Result<()> {
        Ok(())
    }

    /// What a model holds of the card now, in bytes, whether it uses it or not.
    fn held_bytes(&self, model: usize) -> u64;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_one_run() {
        const B: usize = BLOCK_BYTES;
        let neighbours = runs(&[0, 1, 2, 5, 7, 8]);
        assert_eq!(neighbours, [(0, 3 * B), (5 * B, B), (7 * B, 2 * B)]);
        assert_eq!(runs(&[]), []);
    }
}
