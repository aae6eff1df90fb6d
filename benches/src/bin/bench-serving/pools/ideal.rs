//! A pool that all models share and whose calls cost nothing.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::{BLOCK_BYTES, Memory};
use anyhow::Result;

/// Counts blocks, and no more.
pub struct Ideal {
    limit: usize,
    held: Vec<usize>,
}

impl Ideal {
    /// A pool of so many blocks for so many models.
    pub fn new(limit: usize, models: usize) -> Self {
        Self {
            limit,
            held: vec![0; models],
        }
    }
}

impl Memory for Ideal {
    fn most_blocks(&self, _: usize) -> usize {
        self.limit
    }

    fn free_blocks(&self, _: usize) -> usize {
        self.limit - self.held.iter().sum::<usize>()
    }

    fn take(
        &mut self,
        _: &mut u64,
        model: usize,
        count: usize,
        blocks: &mut Vec<u32>,
    ) -> Result<bool> {
        if count > self.free_blocks(model) {
            return Ok(false);
        }
        self.held[model] += count;
        // One block is as good as another.
        blocks.extend((0..count).map(|_| 0));
        Ok(true)
    }

    fn give(&mut self, _: &mut u64, model: usize, blocks: &mut Vec<u32>) -> Result<()> {
        self.held[model] -= blocks.len();
        blocks.clear();
        Ok(())
    }

    fn held_bytes(&self, model: usize) -> u64 {
        (self.held[model] * BLOCK_BYTES) as u64
    }
}
