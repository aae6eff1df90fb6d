//! Handing out block numbers so that pages empty out.

use super::packing::Packing;
use super::runs::Runs;
use super::{BlockBacking, BlockId, ReclaimPlan};
use crate::engine::Patience;
use crate::process::Here;
use crate::sync::{Arc, Mutex};
use crate::{Result, Stream, VmmError};
use core::time::Duration;
use std::collections::BTreeSet;

/// Hands out the blocks of a [`BlockBacking`], for engines that have no allocator of their own.
///
/// It takes first from the fullest pages that have memory, so a cache that shrinks leaves pages
/// empty. A block that is freed stays backed, with its contents, until it is handed out again or a
/// plan gives it up. A prefix cache keeps the blocks that it wants to find again. It offers them at
/// their worth when memory is needed.
///
/// Which number comes next decides how much memory is held. An engine may take free blocks from a
/// queue, first in, first out. It then goes through all of its numbers, and in the end every page
/// is backed:
///
/// ```
/// # #[cfg(feature = "simulator")] {
/// use cuda_vmm::pool::blocks::{BlockAllocator, BlockBacking, ElementSize, LayerSpec, TensorSpec};
/// use cuda_vmm::{Driver, Engine, EngineOptions, Result};
/// use std::collections::VecDeque;
///
/// const BLOCKS: usize = 16_384; // 4 GiB in 8 tensors
/// let device = Driver::detect()?.device(0)?;
/// let backing = || -> Result<BlockBacking> {
///     let engine = Engine::new(&device, EngineOptions::new())?;
///     let tensor = |name| TensorSpec::new(name, &[16, 8, 128], ElementSize::new(2)?);
///     let names = ["0.k", "0.v", "1.k", "1.v", "2.k", "2.v", "3.k", "3.v"];
///     let spec = LayerSpec::new(names.map(tensor).into_iter().collect::<Result<Vec<_>>>()?)?;
///     BlockBacking::new(&engine, spec, BLOCKS, 2 << 20)
/// };
/// // Sequences of 64 blocks come and go, eight at a time.
/// let (queued, packed) = (backing()?, BlockAllocator::new(backing()?));
/// let mut queue: VecDeque<_> = (0..BLOCKS).collect();
/// let mut running = VecDeque::new();
/// for _ in 0..300 {
///     let first_in: Vec<_> = queue.drain(..64).collect();
///     queued.back(first_in.iter().copied())?;
///     running.push_back((first_in, packed.allocate(64)?));
///     if running.len() > 8 {
///         let (first_in, ours) = running.pop_front().unwrap();
///         queue.extend(first_in);
///         packed.free(ours)?;
///     }
/// }
/// assert_eq!(queued.stats().committed_bytes, 4096 << 20); // all there is
/// assert_eq!(packed.backing().stats().committed_bytes, 144 << 20); // the most that ran at once
/// # }
/// # Ok::<(), cuda_vmm::VmmError>(())
/// ```
///
/// An engine that keeps its own allocator takes the free block with the lowest number, gives up
/// what it frees or lets [`reclaim_candidates`](BlockBacking::reclaim_candidates) choose, and names
/// what comes next by [`prefetch`](BlockBacking::prefetch).
///
/// All methods take `&self`. Back blocks and give them up through the allocator only.
#[derive(Debug)]
pub struct BlockAllocator {
    backing: BlockBacking,
    packing: Arc<Here<Mutex<Packing>>>,
}

impl BlockAllocator {
    /// Makes an allocator of all blocks of a backing, none of which is backed yet.
    pub fn new(backing: BlockBacking) -> Self {
        let packing = Mutex::new(Packing::new(&backing.inner().layout));
        let process = backing.engine().device().driver().process();
        let packing = Arc::new(Here::new(process, packing));
        backing.inner().set_packing(&packing);
        let allocator = Self { backing, packing };
        allocator.name_next();
        allocator
    }

    /// Names the blocks that are handed out next, so that their memory is made ahead.
    fn name_next(&self) {
        let inner = self.backing.inner();
        // It fails in a forked process only, where there is none to make.
        _ = inner.expect(|| Ok(self.packing.lock()?.upcoming_bare(inner.ahead_blocks)));
    }

    /// The backing whose blocks it hands out.
    pub fn backing(&self) -> &BlockBacking {
        &self.backing
    }

    /// Hands out `count` blocks, all of them backed. Their contents are undefined.
    ///
    /// # Errors
    /// [`BlockError::OutOfBlocks`](crate::pool::blocks::BlockError::OutOfBlocks); otherwise as
    /// [`BlockBacking::back`]. After an error none is handed out.
    pub fn allocate(&self, count: usize) -> Result<Vec<BlockId>> {
        self.take(count, &Patience::Retiring)
    }

    /// Hands out `count` blocks like [`allocate`](Self::allocate), but never waits for the device.
    ///
    /// # Errors
    /// As [`allocate`](Self::allocate) and [`BlockBacking::try_back`].
    pub fn try_allocate(&self, count: usize) -> Result<Vec<BlockId>> {
        self.take(count, &Patience::None)
    }

    /// Hands out `count` blocks like [`allocate`](Self::allocate), but waits up to `timeout` for
    /// memory, as [`BlockBacking::back_timeout`] does.
    ///
    /// # Errors
    /// As [`allocate`](Self::allocate).
    pub fn allocate_timeout(&self, count: usize, timeout: Duration) -> Result<Vec<BlockId>> {
        self.take(count, &Patience::for_at_most(timeout))
    }

    fn take(&self, count: usize, patience: &Patience) -> Result<Vec<BlockId>> {
        let inner = self.backing.inner();
        // In one step with the record, so that no plan of an earlier moment is carried out in
        // between.
        let blocks = inner.change(|states| {
            let blocks = self.packing.lock()?.take(count)?;
            states.used(&Runs::of(blocks.iter().copied()));
            Ok::<_, VmmError>(blocks)
        })??;
        let backed = inner.back(&Runs::of(blocks.iter().copied()), patience);
        backed.inspect_err(|_| {
            let backed = blocks.iter().copied();
            let backed = backed.filter(|block| self.backing.is_backed(*block));
            let backed: BTreeSet<_> = backed.collect();
            if let Ok(mut packing) = self.packing.lock() {
                packing.untake(&blocks, &backed);
            }
        })?;
        self.name_next();
        Ok(blocks)
    }

    /// Takes blocks back; one may be named twice. They stay backed.
    ///
    /// # Errors
    /// [`BlockError::Invalid`](crate::pool::blocks::BlockError::Invalid),
    /// [`BlockError::NotAllocated`](crate::pool::blocks::BlockError::NotAllocated), and then none
    /// is taken back.
    pub fn free(&self, blocks: impl IntoIterator<Item = BlockId>) -> Result<()> {
        let blocks = blocks.into_iter().collect();
        self.packing.lock()?.put(&blocks)?;
        self.name_next();
        Ok(())
    }

    /// How many blocks are handed out; 0 in a forked process.
    pub fn allocated(&self) -> usize {
        self.packing.lock().map_or(0, |packing| packing.taken())
    }

    /// How many blocks are free and have memory, so that handing them out needs none; 0 in a forked
    /// process.
    pub fn free_backed(&self) -> usize {
        let packing = self.packing.lock();
        packing.map_or(0, |packing| packing.free_backed())
    }

    /// Whether a block is handed out; false in a forked process.
    pub fn is_allocated(&self, block: BlockId) -> bool {
        let packing = self.packing.lock();
        packing.is_ok_and(|packing| packing.is_taken(block))
    }

    /// Chooses blocks to evict, as [`BlockBacking::reclaim_candidates`] does. Free blocks cost
    /// nothing; `cost` is called for the others only.
    pub fn reclaim_candidates(
        &self,
        bytes: usize,
        cost: impl Fn(BlockId) -> Option<f64>,
    ) -> ReclaimPlan {
        (self.backing).reclaim_candidates(bytes, |block| self.cost(block, &cost))
    }

    /// Chooses blocks to evict or to move, as [`BlockBacking::reclaim_candidates_with_moves`] does.
    /// Free blocks cost nothing; `cost` is called for the others only.
    pub fn reclaim_candidates_with_moves(
        &self,
        bytes: usize,
        move_cost: f64,
        cost: impl Fn(BlockId) -> Option<f64>,
    ) -> ReclaimPlan {
        let cost = |block| self.cost(block, &cost);
        (self.backing).reclaim_candidates_with_moves(bytes, move_cost, cost)
    }

    fn cost(&self, block: BlockId, cost: &impl Fn(BlockId) -> Option<f64>) -> Option<f64> {
        if self.is_allocated(block) {
            cost(block)
        } else {
            Some(0.0)
        }
    }

    /// Carries out a plan, as [`BlockBacking::commit`] does, and updates what is handed out.
    /// Evicted blocks are free then. Of a move, the first block is free, and the second is handed
    /// out in its place to the first's owner. The plan's blocks cannot be freed before the call
    /// returns.
    ///
    /// # Errors
    /// As [`BlockBacking::commit`].
    pub fn commit(&self, plan: &ReclaimPlan, stream: &Stream) -> Result<()> {
        let begin = |plan: &ReclaimPlan| Ok(self.packing.lock()?.begin(plan)?);
        let end = |is_done| {
            if let Ok(mut packing) = self.packing.lock() {
                packing.end(plan, is_done);
            }
        };
        self.backing.inner().commit(plan, stream, begin, end)?;
        self.name_next();
        Ok(())
    }
}
