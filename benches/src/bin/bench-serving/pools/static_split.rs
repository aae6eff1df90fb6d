//! A part of the card for each model, allocated before the first request.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::{BLOCK_BYTES, Memory};
use anyhow::Result;

/// Counts the blocks of each model's own part.
pub struct StaticSplit {
    limit: usize,
    used: Vec<usize>,
}

impl StaticSplit {
    /// So many blocks for each of so many models.
    pub fn new(limit: usize, models: usize) -> Self {
        Self {
            limit,
            used: vec![0; models],
        }
    }
}

impl Memory for StaticSplit {
    fn most_blocks(&self, _: usize) -> usize {
        self.limit
    }

    fn free_blocks(&self, model: usize) -> usize {
        self.limit - self.used[model]
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
        self.used[model] += count;
        blocks.extend((0..count).map(|_| 0));
        Ok(true)
    }

    fn give(&mut self, _: &mut u64, model: usize, blocks: &mut Vec<u32>) -> Result<()> {
        self.used[model] -= blocks.len();
        blocks.clear();
        Ok(())
    }

    fn held_bytes(&self, _: usize) -> u64 {
        (self.limit * BLOCK_BYTES) as u64
    }
}
