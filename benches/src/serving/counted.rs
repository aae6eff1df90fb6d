//! Pools whose calls cost nothing: they only count blocks.

use super::memory::{BLOCK_BYTES, Memory};
use anyhow::Result;

/// Blocks of several models, which are all there beforehand.
pub struct Counted {
    limit: usize,
    /// Whether each model has its own part of this many blocks, allocated beforehand.
    is_split: bool,
    held: Vec<usize>,
}

impl Counted {
    /// So many blocks for each model.
    pub fn split(blocks: usize, models: usize) -> Self {
        Self {
            is_split: true,
            ..Self::shared(blocks, models)
        }
    }

    /// So many blocks for all models together.
    pub fn shared(blocks: usize, models: usize) -> Self {
        Self {
            limit: blocks,
            is_split: false,
            held: vec![0; models],
        }
    }
}

impl Memory for Counted {
    fn most_blocks(&self, _: usize) -> usize {
        self.limit
    }

    fn free_blocks(&self, model: usize) -> usize {
        let all = self.held.iter().sum();
        self.limit - if self.is_split { self.held[model] } else { all }
    }

    fn take(&mut self, _: &mut u64, model: usize, count: usize) -> Result<Option<Vec<u32>>> {
        let fits = count <= self.free_blocks(model);
        self.held[model] += if fits { count } else { 0 };
        // One block is as good as another.
        Ok(fits.then(|| vec![0; count]))
    }

    fn give(&mut self, _: &mut u64, model: usize, blocks: Vec<u32>) -> Result<()> {
        self.held[model] -= blocks.len();
        Ok(())
    }

    fn held_bytes(&self, model: usize) -> u64 {
        let own = self.held[model];
        let held = if self.is_split { self.limit } else { own };
        (held * BLOCK_BYTES) as u64
    }
}
