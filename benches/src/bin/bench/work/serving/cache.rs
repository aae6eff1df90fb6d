//! The blocks of a paged cache, a page of the pool each, with the time that the pool takes for them.

use crate::machine::watch;
use anyhow::Result;
use cuda_vmm::VirtualMemoryPool;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Which blocks are free. The last that was freed is handed out first, since its memory is likely to be there still.
#[derive(Debug)]
pub struct Blocks {
    free: Vec<usize>,
    /// The first that was never handed out.
    fresh: usize,
    count: usize,
}

impl Blocks {
    /// So many, none of them in use.
    pub fn new(count: usize) -> Rc<RefCell<Self>> {
        Rc::new(RefCell::new(Self {
            free: Vec::new(),
            fresh: 0,
            count,
        }))
    }

    /// How many are in use.
    pub fn used(&self) -> usize {
        self.fresh - self.free.len()
    }

    /// Takes so many out, in order; `None` if there are fewer.
    fn pick(&mut self, wanted: usize) -> Option<Vec<usize>> {
        if self.used() + wanted > self.count {
            return None;
        }
        let mut picked = Vec::with_capacity(wanted);
        while picked.len() < wanted {
            picked.push(self.free.pop().unwrap_or_else(|| {
                self.fresh += 1;
                self.fresh - 1
            }));
        }
        picked.sort_unstable();
        Some(picked)
    }

    fn put(&mut self, blocks: &[usize]) {
        // The lowest on top.
        self.free.extend(blocks.iter().rev());
    }
}

/// Runs of neighbours, as first and count.
fn runs(blocks: &[usize]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for block in blocks {
        match runs.last_mut() {
            Some((first, count)) if *first + *count == *block => *count += 1,
            _ => runs.push((*block, 1)),
        }
    }
    runs
}

/// What has memory behind a model's blocks.
pub struct Cache {
    blocks: Rc<RefCell<Blocks>>,
    /// The range whose memory comes and goes; none where all blocks have memory from the beginning.
    pool: Option<Arc<VirtualMemoryPool>>,
    base_address: u64,
    block_bytes: usize,
    own_time: Duration,
    calls: usize,
}

impl Cache {
    /// Blocks of a model's range, which get memory when they are taken.
    pub fn elastic(pool: Arc<VirtualMemoryPool>) -> Self {
        let (base_address, block_bytes) = (pool.base_address(), pool.page_bytes());
        Self {
            blocks: Blocks::new(pool.capacity_bytes() / block_bytes),
            pool: Some(pool),
            base_address,
            block_bytes,
            own_time: Duration::ZERO,
            calls: 0,
        }
    }

    /// Blocks, perhaps shared with other caches, that all have memory.
    pub fn backed(blocks: &Rc<RefCell<Blocks>>, base_address: u64, block_bytes: usize) -> Self {
        Self {
            blocks: blocks.clone(),
            pool: None,
            base_address,
            block_bytes,
            own_time: Duration::ZERO,
            calls: 0,
        }
    }

    /// Waits until the worker has made all that it makes ahead, so many bytes, for the model alone on its pool.
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
    pub fn address(&self, block: usize) -> u64 {
        self.base_address + (block * self.block_bytes) as u64
    }

    /// Blocks in use.
    pub fn used(&self) -> usize {
        self.blocks.borrow().used()
    }

    /// Takes so many blocks; `None` if there is no memory for all of them now, and then none is taken.
    pub fn take(&mut self, wanted: usize) -> Result<Option<Vec<usize>>> {
        let picked = self.blocks.borrow_mut().pick(wanted);
        let (Some(picked), Some(pool)) = (&picked, &self.pool) else {
            return Ok(picked);
        };
        let parts: Vec<_> = (runs(picked).iter())
            .map(|(first, count)| (first * self.block_bytes, count * self.block_bytes))
            .collect();
        let started = Instant::now();
        // It may wait: for a page that the worker is making just now, or, where the budget is short, for freed memory whose
        // fence is past by then, as each step ends with its stream.
        let mut taken = parts.iter().enumerate().map(|(done, (offset, bytes))| {
            let outcome = pool.allocate(*offset, *bytes);
            outcome.map_err(|error| (done, error))
        });
        let failed = taken.find_map(Result::err);
        self.calls += parts.len();
        let undone = match &failed {
            Some((done, _)) => pool.deallocate_many(&parts[..*done]),
            None => Ok(()),
        };
        self.own_time += started.elapsed();
        undone?;
        let Some((_, error)) = failed else {
            return Ok(Some(picked.clone()));
        };
        self.blocks.borrow_mut().put(picked);
        match error.is_out_of_memory() {
            true => Ok(None),
            false => Err(error.into()),
        }
    }

    /// Gives blocks back, of as many sequences as there are, at once.
    pub fn give(&mut self, mut blocks: Vec<usize>) -> Result<()> {
        if blocks.is_empty() {
            return Ok(());
        }
        blocks.sort_unstable();
        if let Some(pool) = &self.pool {
            let parts: Vec<_> = (runs(&blocks).iter())
                .map(|(first, count)| (first * self.block_bytes, count * self.block_bytes))
                .collect();
            let started = Instant::now();
            let outcome = pool.deallocate_many(&parts);
            self.own_time += started.elapsed();
            self.calls += 1;
            outcome?;
        }
        self.blocks.borrow_mut().put(&blocks);
        Ok(())
    }

    /// The time that the pool's calls have taken since this was asked last, and how many there were.
    pub fn own_time(&mut self) -> (Duration, usize) {
        (
            std::mem::take(&mut self.own_time),
            std::mem::take(&mut self.calls),
        )
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

    #[test]
    fn neighbours_are_one_run() {
        assert_eq!(runs(&[0, 1, 2, 5, 7, 8]), [(0, 3), (5, 1), (7, 2)]);
        assert_eq!(runs(&[]), []);
    }
}
