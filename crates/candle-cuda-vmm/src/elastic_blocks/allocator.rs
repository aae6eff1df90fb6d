//! An allocator of blocks that prefers backed ones.

use super::ElasticBlocks;
use crate::error::Result;
use cuda_vmm::pool::blocks::{BlockAllocator, BlockId, ReclaimPlan};
use std::time::Duration;

/// Hands out blocks of [`ElasticBlocks`], all of them backed, and prefers those whose pages have
/// memory already: see [`BlockAllocator`].
///
/// Blocks are to be backed and freed through the allocator only.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_cuda_vmm::TensorPool;
///
/// # #[cfg(not(feature = "simulator"))]
/// # fn main() {}
/// # #[cfg(feature = "simulator")]
/// # fn main() -> candle_cuda_vmm::Result<()> {
/// let pool = TensorPool::new(&Device::Cpu)?;
/// let blocks = pool.blocks(4096, [("k", (16, 8, 64), DType::F16), ("v", (16, 8, 64), DType::F16)])?;
/// let allocator = blocks.allocator();
/// let table = allocator.allocate(100)?;
/// blocks.check_table(table.iter().copied())?;
/// allocator.free(table)?; // they stay backed, until the memory is needed
/// let plan = allocator.reclaim_candidates(usize::MAX, |_block| None);
/// allocator.commit(&plan)?;
/// assert_eq!(blocks.stats().backed_blocks, 0);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct ElasticBlockAllocator {
    blocks: ElasticBlocks,
    allocator: BlockAllocator,
}

impl ElasticBlockAllocator {
    pub(super) fn new(blocks: &ElasticBlocks) -> Self {
        Self {
            blocks: blocks.clone(),
            allocator: BlockAllocator::new(blocks.backing().clone()),
        }
    }

    /// Hands out `count` blocks, all of them backed. What is in them is undefined.
    ///
    /// # Errors
    /// As [`BlockAllocator::allocate`]; then none is handed out.
    pub fn allocate(&self, count: usize) -> Result<Vec<BlockId>> {
        self.taken(self.allocator.allocate(count)?)
    }

    /// As [`allocate`](Self::allocate), but never waits for the device.
    ///
    /// # Errors
    /// As [`allocate`](Self::allocate).
    pub fn try_allocate(&self, count: usize) -> Result<Vec<BlockId>> {
        self.taken(self.allocator.try_allocate(count)?)
    }

    /// As [`allocate`](Self::allocate), but waits up to `timeout` for memory, also for what other
    /// accounts are asked to give back.
    ///
    /// # Errors
    /// As [`allocate`](Self::allocate).
    pub fn allocate_timeout(&self, count: usize, timeout: Duration) -> Result<Vec<BlockId>> {
        self.taken(self.allocator.allocate_timeout(count, timeout)?)
    }

    fn taken(&self, blocks: Vec<BlockId>) -> Result<Vec<BlockId>> {
        self.blocks.0.memory.await_copies()?;
        Ok(blocks)
    }

    /// Takes blocks back. They stay backed until a plan frees them.
    ///
    /// # Errors
    /// As [`BlockAllocator::free`]; then none is taken back.
    pub fn free(&self, blocks: impl IntoIterator<Item = BlockId>) -> Result<()> {
        Ok(self.allocator.free(blocks)?)
    }

    /// Returns how many blocks are handed out.
    pub fn allocated(&self) -> usize {
        self.allocator.allocated()
    }

    /// Returns how many blocks are free and backed, so that handing them out takes no memory.
    pub fn free_backed(&self) -> usize {
        self.allocator.free_backed()
    }

    /// Chooses blocks to evict so that whole pages become empty; see
    /// [`BlockAllocator::reclaim_candidates`]. Free blocks cost nothing; `cost` is asked for the
    /// others.
    pub fn reclaim_candidates(
        &self,
        bytes: usize,
        cost: impl Fn(BlockId) -> Option<f64>,
    ) -> ReclaimPlan {
        self.allocator.reclaim_candidates(bytes, cost)
    }

    /// As [`reclaim_candidates`](Self::reclaim_candidates), but may also move blocks, at a cost of
    /// `move_cost` each.
    pub fn reclaim_candidates_with_moves(
        &self,
        bytes: usize,
        move_cost: f64,
        cost: impl Fn(BlockId) -> Option<f64>,
    ) -> ReclaimPlan {
        (self.allocator).reclaim_candidates_with_moves(bytes, move_cost, cost)
    }

    /// Carries out a plan, as [`ElasticBlocks::commit`] does. Evicted blocks are free then; of a
    /// move the second block is handed out in place of the first.
    ///
    /// # Errors
    /// As [`ElasticBlocks::commit`]; then nothing has changed.
    pub fn commit(&self, plan: &ReclaimPlan) -> Result<()> {
        let commit = |stream: &_| self.allocator.commit(plan, stream);
        self.blocks.0.memory.commit(plan, commit)
    }

    /// Returns the blocks.
    pub fn blocks(&self) -> &ElasticBlocks {
        &self.blocks
    }
}
