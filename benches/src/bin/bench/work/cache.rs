//! The blocks of a paged cache, a page of the pool each, with the time that the pool takes for
//! them.

use crate::machine::watch;
use anyhow::Result;
use cuda_vmm::VirtualMemoryPool;
use cuda_vmm_benches::serving::{BLOCK_BYTES, allocate_runs, runs};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Which blocks are free. The last that was freed is handed out first, since its memory is likely
/// to be there still.
#[derive(Debug)]
pub struct Blocks {
    free: Vec<u32>,
    /// The first that was never handed out.
    fresh: u32,
    count: u32,
}

impl Blocks {
    /// This many, none of them in use.
    pub fn new(count: usize) -> Rc<RefCell<Self>> {
        Rc::new(RefCell::new(Self {
            free: Vec::new(),
            fresh: 0,
            count: count as u32,
        }))
    }

    /// How many are in use.
    fn used(&self) -> usize {
        self.fresh as usize - self.free.len()
    }

    /// Takes this many out, in order; `None` if there are fewer.
    fn pick(&mut self, wanted: usize) -> Option<Vec<u32>> {
        if self.used() + wanted > self.count as usize {
            return None;
        }
        let mut next = || {
            self.free.pop().unwrap_or_else(|| {
                self.fresh += 1;
                self.fresh - 1
            })
        };
        let mut picked: Vec<_> = (0..wanted).map(|_| next()).collect();
        picked.sort_unstable();
        Some(picked)
    }

    fn put(&mut self, blocks: &[u32]) {
        // The lowest on top.
        self.free.extend(blocks.iter().rev());
    }
}

/// What has memory behind a model's blocks.
pub struct Cache {
    blocks: Rc<RefCell<Blocks>>,
    /// The range whose memory comes and goes; none if all blocks have memory from the beginning.
    pool: Option<Arc<VirtualMemoryPool>>,
    base_address: u64,
    used: usize,
    own_time: Duration,
}

impl Cache {
    /// Blocks of a model's range, which get memory when they are taken.
    pub fn elastic(pool: Arc<VirtualMemoryPool>) -> Self {
        let blocks = Blocks::new(pool.capacity_bytes() / BLOCK_BYTES);
        let cache = Self::backed(&blocks, pool.base_address());
        let pool = Some(pool);
        Self { pool, ..cache }
    }

    /// Blocks, perhaps shared with other caches, that all have memory.
    pub fn backed(blocks: &Rc<RefCell<Blocks>>, base_address: u64) -> Self {
        Self {
            blocks: blocks.clone(),
            pool: None,
            base_address,
            used: 0,
            own_time: Duration::ZERO,
        }
    }

    /// Waits until the worker has made all that it makes ahead, this many bytes, for the model
    /// alone on its pool.
    pub fn await_ahead(&self, bytes: usize) -> Result<()> {
        let Some(pool) = &self.pool else {
            return Ok(());
        };
        // It makes more only when half of it is gone, and may make a chunk more than is asked for.
        watch(pool.engine(), "memory to be made ahead", |stats| {
            stats.parts.filling_bytes == 0 && stats.parts.ahead_bytes > bytes / 2
        })
    }

    /// The address of a block.
    pub fn address(&self, block: u32) -> u64 {
        self.base_address + block as u64 * BLOCK_BYTES as u64
    }

    /// Blocks that there are.
    pub fn count(&self) -> usize {
        self.blocks.borrow().count as usize
    }

    /// Blocks that this cache has taken.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Takes this many blocks; `None` if there is no memory for all of them now, and then none is
    /// taken.
    pub fn take(&mut self, wanted: usize) -> Result<Option<Vec<u32>>> {
        let Some(picked) = self.blocks.borrow_mut().pick(wanted) else {
            return Ok(None);
        };
        if let Some(pool) = &self.pool {
            let runs = runs(&picked);
            let started = Instant::now();
            // It may wait: for a page that the worker is making just now, or, if the budget is
            // short, for freed memory whose fence is past by then, as each step ends with its
            // stream.
            let taken = allocate_runs(pool, &runs);
            self.own_time += started.elapsed();
            if !matches!(taken, Ok(true)) {
                self.blocks.borrow_mut().put(&picked);
                return taken.map(|_| None);
            }
        }
        self.used += wanted;
        Ok(Some(picked))
    }

    /// Gives blocks back, of any number of sequences, at once.
    pub fn give(&mut self, mut blocks: Vec<u32>) -> Result<()> {
        if blocks.is_empty() {
            return Ok(());
        }
        blocks.sort_unstable();
        if let Some(pool) = &self.pool {
            let runs = runs(&blocks);
            let started = Instant::now();
            let outcome = pool.deallocate_many(&runs);
            self.own_time += started.elapsed();
            outcome?;
        }
        self.used -= blocks.len();
        self.blocks.borrow_mut().put(&blocks);
        Ok(())
    }

    /// The time that the pool's calls have taken since this was asked last.
    pub fn own_time(&mut self) -> Duration {
        std::mem::take(&mut self.own_time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_in_use_once_and_the_last_freed_come_first() {
        let blocks = Blocks::new(6);
        let mut blocks = blocks.borrow_mut();
        assert_eq!(blocks.pick(4), Some(vec![0, 1, 2, 3]));
        blocks.put(&[1, 3]);
        assert_eq!(blocks.used(), 2);
        assert_eq!(blocks.pick(5), None);
        assert_eq!(blocks.pick(1), Some(vec![1]));
        assert_eq!(blocks.pick(3), Some(vec![3, 4, 5]));
        assert_eq!(blocks.pick(1), None);
    }
}
