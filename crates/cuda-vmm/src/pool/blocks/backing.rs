//! The tensors of a specification, and the memory behind their blocks.

use super::block_states::BlockStates;
use super::layout::Layout;
use super::memory::BlockMemory;
use super::{
    BackedBlocks, BlockError, BlockHold, BlockId, BlockOptions, BlockPin, BlockStats, BlockTensor,
    LayerSpec, ReclaimPlan,
};
use crate::engine::Patience;
use crate::process::Here;
use crate::size::check_page_bytes;
use crate::sync::{Arc, Condvar, Mutex, Weak};
use crate::{Account, Engine, LeaseToken, Result, Stream, VmmError};
use core::ops::Range;
use core::time::Duration;

/// Memory behind the blocks of a paged cache; a cheap clone.
///
/// Each tensor of the [`LayerSpec`] has a range of addresses for all blocks, for life. A block is
/// *backed* from [`back`](Self::back) until it is given up, in all tensors at once. Its contents
/// are undefined until written, unless [`BlockOptions::zero_on_back`] says otherwise. They then
/// stay, whatever becomes of its neighbours. The caller reads and writes through the addresses, and
/// may touch backed blocks only.
///
/// Pages are made and given back one by one, whatever the engine's largest chunk is, since any of
/// them may be the one that empties. Take pages of 16 or 32 MiB if kernels read and write much, and
/// small ones if blocks come and go.
///
/// A block that is given up leaves at once. The memory of pages that are then empty leaves when the
/// device has finished with them. That is after the work then queued on the streams that
/// [`use_stream`](Self::use_stream) named, or after all work of the context if it named none. A
/// block that is given up and backed again in a page which a neighbour kept may find earlier work
/// still running on it, as in [`VirtualMemoryPool`](crate::VirtualMemoryPool).
///
/// All methods take `&self`. A call waits for a block that another thread backs or gives up at that
/// moment.
#[derive(Debug, Clone)]
pub struct BlockBacking(Arc<BlockMemory>);

impl BlockBacking {
    /// Reserves `blocks` blocks of addresses for each tensor, with an account of its own. It takes
    /// no memory.
    ///
    /// `page_bytes` is a power of two of at least the device's granularity.
    ///
    /// # Errors
    /// [`VmmError::ZeroSize`] for no blocks; [`BlockError::Overflow`] if the bytes of all blocks do
    /// not fit in an address; [`BlockError::TooMany`] if the host has no memory for the record;
    /// otherwise as [`VirtualMemoryPool::on_engine`](crate::VirtualMemoryPool::on_engine).
    pub fn new(engine: &Engine, spec: LayerSpec, blocks: usize, page_bytes: usize) -> Result<Self> {
        Self::on_account(&engine.own_account()?, spec, blocks, page_bytes)
    }

    /// Reserves addresses like [`new`](Self::new), on an account, which is charged for all memory.
    ///
    /// # Errors
    /// As [`new`](Self::new); [`VmmError::Closed`] if the account is closed.
    pub fn on_account(
        account: &Account,
        spec: LayerSpec,
        blocks: usize,
        page_bytes: usize,
    ) -> Result<Self> {
        Self::with_options(account, spec, blocks, page_bytes, BlockOptions::new())
    }

    /// Reserves addresses like [`on_account`](Self::on_account), with options.
    ///
    /// # Errors
    /// As [`on_account`](Self::on_account); as [`use_stream`](Self::use_stream) for the stream on
    /// which blocks are to be zeroed.
    ///
    /// ```
    /// # #[cfg(feature = "simulator")] {
    /// use cuda_vmm::pool::blocks::{
    ///     BlockAllocator, BlockBacking, BlockOptions, ElementSize, LayerSpec, TensorSpec,
    /// };
    /// use cuda_vmm::{Driver, Engine, EngineOptions, Quota, WorkerMode};
    ///
    /// let device = Driver::detect()?.device(0)?;
    /// // In production the worker is a thread, and takes these steps by itself.
    /// let engine = Engine::new(&device, EngineOptions::new().worker(WorkerMode::Manual))?;
    /// let account = engine.account("model", Quota::new())?;
    /// let spec = LayerSpec::new([TensorSpec::new("k", &[16, 8, 128], ElementSize::new(2)?)?])?;
    /// let options = BlockOptions::new().ahead_blocks_max(128);
    /// let backing = BlockBacking::with_options(&account, spec, 4096, 2 << 20, options)?;
    /// let allocator = BlockAllocator::new(backing);
    /// engine.step();
    /// let made = engine.counters().device_calls;
    /// allocator.allocate(100)?; // in two pages, which are there
    /// assert_eq!(engine.counters().device_calls, made);
    /// # }
    /// # Ok::<(), cuda_vmm::VmmError>(())
    /// ```
    pub fn with_options(
        account: &Account,
        spec: LayerSpec,
        blocks: usize,
        page_bytes: usize,
        options: BlockOptions,
    ) -> Result<Self> {
        if blocks == 0 {
            return Err(VmmError::ZeroSize {
                what: "number of blocks",
            });
        }
        let device = account.engine().device();
        check_page_bytes(page_bytes, device.granularity_bytes())?;
        let (layout, class_of) = Layout::new(spec.tensors(), blocks, page_bytes)?;
        let states = BlockStates::new(&layout)?;
        let ahead_blocks = options.ahead_blocks_max.min(blocks);
        let process = device.driver().process();
        let tensors = spec.into_tensors().into_iter().zip(class_of);
        let tensors = tensors
            .map(|(spec, class)| {
                BlockTensor::new(account, spec, blocks, (class, page_bytes), ahead_blocks)
            })
            .collect::<Result<_>>()?;
        let memory = Arc::new(BlockMemory {
            account: account.clone(),
            tensors,
            layout,
            page_bytes,
            states: Here::new(process, Mutex::new(states)),
            changed: Condvar::new(),
            identity: Arc::default(),
            packing: Mutex::new(Weak::new()),
            zero_on_back: options.zero_on_back,
            ahead_blocks,
            named: Here::new(process, Mutex::default()),
        });
        let reclaimer = Arc::downgrade(&memory);
        account.add_reclaimer(reclaimer);
        let backing = Self(memory);
        if let Some(stream) = &backing.0.zero_on_back {
            backing.use_stream(stream)?;
        }
        Ok(backing)
    }

    pub(super) fn inner(&self) -> &Arc<BlockMemory> {
        &self.0
    }

    /// Backs blocks in all tensors, or none of them if that fails. Blocks that are backed already
    /// stay as they are, with their contents. A block may be named twice. Each page that holds none
    /// of the backed blocks yet is made (`cuMemCreate`, `cuMemMap`, `cuMemSetAccess`).
    ///
    /// Call it each time a block is put to use again, backed or not: it makes each plan stale that
    /// would give the block up. It waits for retiring memory only, and only if that is enough.
    ///
    /// # Errors
    /// [`BlockError::Invalid`] for a number that no block has; [`VmmError::Leased`] for a block
    /// that was given up under a [lease](Self::lease) and still is leased;
    /// [`VmmError::OutOfPhysicalMemory`] if the budget has no room, before any driver call if that
    /// is known; [`BlockError::CapturingZeros`]; [`VmmError::Driver`] if a call failed;
    /// [`VmmError::Quarantined`], [`VmmError::Forked`]. After an error the same blocks are backed
    /// as before, with their contents; pages that were made on the way retire.
    pub fn back(&self, blocks: impl IntoIterator<Item = BlockId>) -> Result<()> {
        let runs = self.0.runs(blocks)?;
        self.0.back(&runs, &Patience::Retiring).map(drop)
    }

    /// Backs blocks like [`back`](Self::back), but never waits for the device. If memory is
    /// retiring, it returns an error for which [`is_retryable`](VmmError::is_retryable) holds.
    ///
    /// # Errors
    /// As [`back`](Self::back).
    pub fn try_back(&self, blocks: impl IntoIterator<Item = BlockId>) -> Result<()> {
        let runs = self.0.runs(blocks)?;
        self.0.back(&runs, &Patience::None).map(drop)
    }

    /// Backs blocks like [`back`](Self::back), but waits up to `timeout` for memory, also for what
    /// other accounts hold and are asked to give back; see
    /// [`VirtualMemoryPool::allocate_timeout`](crate::VirtualMemoryPool::allocate_timeout).
    ///
    /// # Errors
    /// As [`back`](Self::back).
    pub fn back_timeout(
        &self,
        blocks: impl IntoIterator<Item = BlockId>,
        timeout: Duration,
    ) -> Result<()> {
        let runs = self.0.runs(blocks)?;
        let patience = Patience::for_at_most(timeout);
        self.0.back(&runs, &patience).map(drop)
    }

    /// Backs blocks like [`try_back`](Self::try_back), and gives the newly backed ones up again if
    /// the guard is dropped. Call [`BackedBlocks::keep`] to keep them.
    ///
    /// Use it for a step that needs more than memory: back what it would need, decide, and keep it.
    ///
    /// # Errors
    /// As [`back`](Self::back).
    pub fn try_reserve(&self, blocks: impl IntoIterator<Item = BlockId>) -> Result<BackedBlocks> {
        let runs = self.0.runs(blocks)?;
        let (newly, clock) = self.0.back(&runs, &Patience::None)?;
        Ok(BackedBlocks::new(self.0.clone(), newly, clock))
    }

    /// Gives blocks up with their contents. A block may be named twice. It never waits for the
    /// device, but for a launch that [holds](Self::hold) the blocks.
    ///
    /// A page empties only if all its blocks go. So rather leave unused blocks backed, and let
    /// [`reclaim_candidates`](Self::reclaim_candidates) choose.
    ///
    /// # Errors
    /// [`BlockError::Invalid`] for a number that no block has; [`BlockError::NotBacked`];
    /// [`BlockError::Pinned`] for a block that a pin or another call keeps; [`VmmError::Forked`].
    /// After an error none is given up.
    pub fn unback(&self, blocks: impl IntoIterator<Item = BlockId>) -> Result<()> {
        let runs = self.0.runs(blocks)?;
        let mut states = self
            .0
            .once(|states| states.is_settled(&runs) && !states.is_held())?;
        states.leave(&runs)?;
        drop(states);
        self.0.give(&runs);
        self.0.change(|states| states.left(&runs))
    }

    /// Names the blocks that will be backed next, in this order, so that the worker makes memory
    /// for them ahead. At most [`ahead_blocks_max`](super::BlockOptions::ahead_blocks_max) of them
    /// count. The names hold until the next call. A [`BlockAllocator`](super::BlockAllocator) does
    /// this itself.
    ///
    /// Without it, memory is made behind the latest block that was backed. For an engine with an
    /// allocator of its own the next blocks are the first of its free list. Call it after each step
    /// in which blocks were backed or freed. It calls no driver.
    ///
    /// # Errors
    /// [`BlockError::Invalid`] for a number that no block has; [`VmmError::Forked`]. After an error
    /// the names are as before.
    pub fn prefetch(&self, blocks: impl IntoIterator<Item = BlockId>) -> Result<()> {
        let next: Vec<_> = blocks.into_iter().take(self.0.ahead_blocks).collect();
        self.0.runs(next.iter().copied())?;
        self.0
            .expect(|| Ok(next.iter().map(|block| *block..block + 1).collect()))
    }

    /// Keeps backed blocks where they are until the pin is dropped. No plan names them, and
    /// [`unback`](Self::unback) refuses them.
    ///
    /// # Errors
    /// [`BlockError::Invalid`] for a number that no block has; [`BlockError::NotBacked`];
    /// [`VmmError::Forked`]. After an error none is pinned.
    pub fn pin(&self, blocks: impl IntoIterator<Item = BlockId>) -> Result<BlockPin> {
        let runs = self.0.runs(blocks)?;
        self.0.settled(&runs)?.pin(&runs)?;
        Ok(BlockPin::new(self.0.clone(), runs))
    }

    /// Keeps every block where it is, for the time of a launch: calls that give blocks up wait until
    /// the result is dropped. Blocks may be backed meanwhile.
    ///
    /// Look under it whether the blocks that the launch uses are backed, then queue the launch on a
    /// stream that the backing [names](Self::use_stream), and drop it. What is given up later is
    /// unmapped behind that work. As long as [`generation`](BlockHold::generation) is the same, the
    /// blocks that were backed are backed, and need no other look.
    ///
    /// It costs two locks. Hold it for no longer than the launch takes. Meanwhile give up no blocks
    /// on the same thread, and wait for none that does: that would wait for ever.
    ///
    /// # Errors
    /// [`VmmError::Forked`].
    pub fn hold(&self) -> Result<BlockHold> {
        BlockHold::new(self.0.clone())
    }

    /// Keeps the memory of neighbouring blocks of one tensor until `token` is released. All of them
    /// must be backed. The memory stays mapped, at its addresses, and is given to no other
    /// allocation; see [`VirtualMemoryPool::lease`](crate::VirtualMemoryPool::lease). Use it for a
    /// framework's tensor over the blocks. Unlike a [pin](Self::pin) it ends by itself, and does
    /// not keep the backing alive.
    ///
    /// While the token is not released no plan evicts the blocks, moves them, or moves others into
    /// them. [`unback`](Self::unback) does give them up: their memory stays as it is until the
    /// token is released, and then retires. Until then [`back`](Self::back) returns
    /// [`VmmError::Leased`] for them. The backing may be dropped as well.
    ///
    /// # Errors
    /// [`BlockError::InvalidTensor`], [`BlockError::Invalid`], [`BlockError::NotBacked`];
    /// [`VmmError::ZeroSize`] for no blocks; [`VmmError::Forked`]. The token is then dropped.
    pub fn lease(
        &self,
        tensor: usize,
        blocks: Range<BlockId>,
        token: impl LeaseToken,
    ) -> Result<()> {
        let tensors = self.tensors().len();
        let of_tensor = self.tensors().get(tensor);
        let of_tensor = of_tensor.ok_or(BlockError::InvalidTensor { tensor, tensors })?;
        if blocks.is_empty() {
            return Err(VmmError::ZeroSize {
                what: "number of blocks",
            });
        }
        // A plan that was made before is stale by the pin; one that is made later sees the pin, or
        // the lease.
        let _pin = self.pin_run(blocks.clone())?;
        of_tensor.lease(&blocks, token)
    }

    fn pin_run(&self, blocks: Range<BlockId>) -> Result<BlockPin> {
        let all = self.blocks();
        // Before a run of any length is counted.
        if blocks.end > all {
            let block = blocks.start.max(all);
            return Err(BlockError::Invalid { block, blocks: all }.into());
        }
        self.pin(blocks)
    }

    /// Chooses blocks to evict so that at least `bytes` bytes of whole pages empty, at the least
    /// cost that a greedy search finds. Changes nothing.
    ///
    /// `cost` returns what it costs to evict a block, in any unit. It returns 0 or less for a block
    /// of no value, and `None`, or no finite number, for a block in use. It is called once for each
    /// block that is backed and not pinned, with no lock held. The plan never evicts a block whose
    /// page would stay. If less can be freed than was asked for, the plan frees that, and
    /// [`is_enough`](ReclaimPlan::is_enough) is false.
    pub fn reclaim_candidates(
        &self,
        bytes: usize,
        cost: impl Fn(BlockId) -> Option<f64>,
    ) -> ReclaimPlan {
        self.0.plan(bytes, None, cost)
    }

    /// Chooses blocks to evict or to move so that whole pages empty. It works like
    /// [`reclaim_candidates`](Self::reclaim_candidates), but may also move blocks, those in use
    /// among them, for `move_cost` each. They move into backed blocks of no value if that is
    /// cheaper than to evict them. If that does not free enough, they move into blocks that can be
    /// evicted. [Pin](Self::pin) blocks that can neither be evicted nor moved.
    pub fn reclaim_candidates_with_moves(
        &self,
        bytes: usize,
        move_cost: f64,
        cost: impl Fn(BlockId) -> Option<f64>,
    ) -> ReclaimPlan {
        let move_cost = Some(move_cost.max(0.0)).filter(|cost| cost.is_finite());
        self.0.plan(bytes, move_cost, cost)
    }

    /// Carries out a plan. It copies what moves (`cuMemcpyDtoDAsync`) behind what is queued on
    /// `stream`. Then it gives up the blocks that are evicted or moved away. Pages retire behind
    /// the copies. It never waits for the device.
    ///
    /// After it returns, tables must name the blocks' new places, and work that reads them must be
    /// ordered behind the copies. Work queued before may still read the old places. Writes to a
    /// moved block must be ordered before the call, on `stream`. Freed memory waits for the copies,
    /// also if `stream` is not named, and for no other work of that stream.
    ///
    /// # Errors
    /// [`BlockError::ForeignPlan`] for a plan of another backing; [`BlockError::Pinned`] if one of
    /// its blocks is pinned now; [`BlockError::StalePlan`] if one of its blocks, or of its pages,
    /// was used since the plan was made; [`BlockError::Capturing`] if the plan moves blocks and
    /// `stream` is being captured; [`VmmError::WrongDevice`], [`VmmError::WrongDriver`],
    /// [`VmmError::Driver`], [`VmmError::Forked`]. After an error all is as before, except that the
    /// blocks that others were to move into may hold anything.
    pub fn commit(&self, plan: &ReclaimPlan, stream: &Stream) -> Result<()> {
        self.0.commit(plan, stream, |_| Ok(()), |_| {})
    }

    /// Names a stream whose work uses the blocks. Freed memory then waits for the named streams
    /// only. Name each stream before it uses the blocks: freed memory does not wait for work on
    /// others.
    ///
    /// # Errors
    /// [`VmmError::WrongDevice`], [`VmmError::WrongDriver`], [`VmmError::Forked`].
    pub fn use_stream(&self, stream: &Stream) -> Result<()> {
        self.0.check_process()?;
        self.engine().device().expect_same(stream.device())?;
        let mut tensors = self.0.tensors.iter();
        tensors.try_for_each(|tensor| tensor.pool().use_stream(stream))
    }

    /// Stops naming a stream, as
    /// [`VirtualMemoryPool::forget_stream`](crate::VirtualMemoryPool::forget_stream): from now on
    /// its work must not touch the blocks. The stream on which blocks are
    /// [zeroed](super::BlockOptions::zero_on_back) stays named.
    ///
    /// # Errors
    /// As [`use_stream`](Self::use_stream).
    pub fn forget_stream(&self, stream: &Stream) -> Result<()> {
        let zeroing = self.0.zero_on_back.as_ref();
        if zeroing.is_some_and(|zeroing| zeroing.raw() == stream.raw()) {
            return Ok(());
        }
        let mut tensors = self.0.tensors.iter();
        tensors.try_for_each(|tensor| tensor.pool().forget_stream(stream))
    }

    /// Returns whether a block is backed; false for numbers that no block has, and in a forked
    /// process.
    pub fn is_backed(&self, block: BlockId) -> bool {
        self.0
            .look(|states| states.is_backed(block))
            .unwrap_or(false)
    }

    /// How many blocks, from block 0 on, are backed without a gap.
    pub fn backed_prefix(&self) -> usize {
        self.0.look(BlockStates::backed_prefix).unwrap_or_default()
    }

    /// The pages that a block touches in each tensor, in order, backed or not. Blocks with the same
    /// page share it.
    ///
    /// # Errors
    /// [`BlockError::Invalid`].
    pub fn pages_of(&self, block: BlockId) -> Result<Vec<Range<usize>>> {
        let blocks = self.blocks();
        if block >= blocks {
            return Err(BlockError::Invalid { block, blocks }.into());
        }
        let pages = |tensor: &BlockTensor| {
            self.0.layout.classes[tensor.class()].pages_of(&(block..block + 1))
        };
        Ok(self.0.tensors.iter().map(pages).collect())
    }

    /// The tensors, in the order of the specification.
    pub fn tensors(&self) -> &[BlockTensor] {
        &self.0.tensors
    }

    /// The index of the tensor of this name among [`tensors`](Self::tensors).
    ///
    /// # Errors
    /// [`BlockError::UnknownTensor`].
    pub fn index_of(&self, name: &str) -> Result<usize> {
        let index = (self.tensors().iter()).position(|tensor| tensor.name() == name);
        let unknown = || BlockError::UnknownTensor {
            tensor: name.to_owned(),
        };
        Ok(index.ok_or_else(unknown)?)
    }

    /// How many blocks there are.
    pub fn blocks(&self) -> usize {
        self.0.layout.blocks
    }

    /// The page size of each tensor, in bytes.
    pub fn page_bytes(&self) -> usize {
        self.0.page_bytes
    }

    /// The account that all tensors are charged to.
    pub fn account(&self) -> &Account {
        &self.0.account
    }

    /// The engine that backs the blocks.
    pub fn engine(&self) -> &Engine {
        self.0.account.engine()
    }

    /// The numbers of the backing; in a forked process only those that do not change.
    pub fn stats(&self) -> BlockStats {
        let layout = &self.0.layout;
        let counted = self.0.look(|states| BlockStats {
            backed_blocks: states.backed(),
            pinned_blocks: states.pinned(),
            page_bytes: states.page_bytes(),
            ..BlockStats::default()
        });
        let tensors = self.0.tensors.iter();
        BlockStats {
            blocks: layout.blocks,
            block_bytes: layout.block_bytes(),
            committed_bytes: tensors.map(|tensor| tensor.stats().committed_bytes).sum(),
            ..counted.unwrap_or_default()
        }
    }
}
