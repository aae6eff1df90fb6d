//! The tensors of a paged cache, with memory for the blocks in use.

mod allocator;
mod memory;
mod options;

use crate::error::Result;
use crate::tensor_pool::TensorPool;
pub use allocator::ElasticBlockAllocator;
use candle_core::{DType, Error, Shape, Tensor};
use cuda_vmm::pool::blocks::{
    BackedBlocks, BlockBacking, BlockError, BlockId, BlockPin, BlockStats, ElementSize, LayerSpec,
    ReclaimPlan, TensorSpec,
};
use cuda_vmm::{Account, Engine, Keep, Slept, WakeOptions};
use memory::BlockMemory;
pub use options::ElasticBlocksOptions;
use std::sync::Arc;
use std::time::Duration;

/// The tensors of a paged cache, `[num_blocks, block shape…]` each, with memory for the blocks that
/// are backed. Cloning is cheap.
///
/// It replaces tensors that are allocated for all blocks up front. Block numbers, tables and the
/// allocator stay with the inference engine:
/// - The engine [backs](Self::back) blocks before it uses them.
/// - To free memory, it asks [which blocks to evict](Self::reclaim_candidates),
///   [commits](Self::commit) that plan, and updates its tables.
///
/// The backing is that of [`cuda_vmm::pool::blocks`], on Candle's stream; see there for pages,
/// plans and pins.
///
/// # Tensors for kernels
/// - [`prefix`](Self::prefix) is safe. It shows the blocks from the first on that are backed
///   without a gap.
/// - [`reserved_tensors`](Self::reserved_tensors) is unsafe. It shows all blocks, backed or not,
///   for as long as the cache lives.
///
/// The content of a backed block is undefined until it is written, unless
/// [`ElasticBlocksOptions::zero_on_back`] is set.
///
/// # On a CPU device
/// The tensors are plain tensors of all `num_blocks`, allocated by [`new`](Self::new), and results
/// are the same. The blocks are backed on the simulated device, on the pool's engine, as on a GPU:
/// plans, refusals and [`stats`](Self::stats) are those of a GPU. Host memory does not follow them.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "simulator")] {
/// use candle_core::{DType, Device, Tensor};
/// use candle_cuda_vmm::TensorPool;
///
/// let pool = TensorPool::new(&Device::Cpu)?; // or `Device::new_cuda(0)?`
/// // [size, heads, dim] for one layer's keys and values, and addresses for 4096 blocks.
/// let entries = ["k", "v"].map(|name| (name, (16, 8, 64), DType::F16));
/// let blocks = pool.blocks(4096, entries)?;
/// blocks.back(0..10)?;
/// let k = blocks.prefix("k")?;
/// assert_eq!(k.dims(), [10, 16, 8, 64]);
/// k.slice_set(&Tensor::ones((1, 16, 8, 64), DType::F16, &Device::Cpu)?, 0, 3)?;
/// blocks.check_table([3, 9])?;
/// assert!(blocks.check_table([3, 10]).is_err());
/// # }
/// # Ok::<(), candle_cuda_vmm::VmmError>(())
/// ```
///
/// An engine that has its own tables and its own allocator:
///
/// ```
/// # #[cfg(feature = "simulator")] {
/// use candle_core::{DType, Device};
/// use candle_cuda_vmm::TensorPool;
///
/// let device = Device::Cpu; // or `Device::new_cuda(0)?`
/// let pool = TensorPool::new(&device)?;
///
/// // Before: `Tensor::zeros((4096, 16, 8, 128), DType::F16, &device)?` for each of the four,
/// // 512 MiB in all.
/// let shape = (16, 8, 128);
/// let entries = ["0.k", "0.v", "1.k", "1.v"].map(|name| (name, shape, DType::F16));
/// let cache = pool.blocks(4096, entries)?;
/// // SAFETY: kernels get tables of backed blocks only, and no operation reads a whole tensor.
/// // [4096, 16, 8, 128] each. Their addresses never change.
/// # #[allow(unused_variables)]
/// let tensors = unsafe { cache.reserved_tensors()? };
///
/// // Sixteen sequences of 64 blocks. The engine's allocator has chosen the blocks, and now they
/// // get memory.
/// let mut tables: Vec<Vec<usize>> = (0..16).map(|at| (64 * at..64 * at + 64).collect()).collect();
/// for table in &tables {
///     cache.back(table.iter().copied())?;
///     debug_assert!(cache.check_table(table.iter().copied()).is_ok());
///     // Launch the kernels with `tensors` and this table, as before.
/// }
/// assert_eq!(cache.stats().committed_bytes, 128 << 20); // of 512 MiB
///
/// // All but two sequences have ended. Their blocks are kept for prompts with the same prefix,
/// // until memory is needed elsewhere. Then the blocks of least value are evicted, and those in
/// // use may move.
/// tables.truncate(2);
/// let is_used = |block| tables.iter().flatten().any(|used| *used == block);
/// let cost = |block| (!is_used(block)).then_some(0.0);
/// let plan = cache.reclaim_candidates_with_moves(usize::MAX, 1.0, cost);
/// cache.commit(&plan)?;
/// for block in tables.iter_mut().flatten() {
///     if let Some((_, to)) = plan.moves().iter().find(|(from, _)| from == block) {
///         *block = *to;
///     }
/// }
/// device.synchronize()?;
/// cache.engine().step(); // the engine's worker does so too, a little later
/// assert_eq!(cache.stats().committed_bytes, 16 << 20);
/// # }
/// # Ok::<(), candle_cuda_vmm::VmmError>(())
/// ```
#[derive(Debug, Clone)]
pub struct ElasticBlocks(Arc<ElasticBlocksInner>);

#[derive(Debug)]
struct ElasticBlocksInner {
    pool: TensorPool,
    dtypes: Vec<DType>,
    memory: BlockMemory,
}

impl ElasticBlocksInner {
    /// Backs blocks by `back`.
    fn back<T>(
        &self,
        blocks: impl IntoIterator<Item = BlockId>,
        back: impl FnOnce(Vec<BlockId>) -> cuda_vmm::Result<T>,
    ) -> Result<T> {
        let blocks: Vec<_> = blocks.into_iter().collect();
        self.memory.before_back(&blocks)?;
        let backed = back(blocks)?;
        self.memory.await_copies()?;
        Ok(backed)
    }
}

impl TensorPool {
    /// Makes the tensors of a paged cache; see [`ElasticBlocks::new`].
    ///
    /// # Errors
    /// As [`ElasticBlocks::new`].
    pub fn blocks<N: Into<String>, S: Into<Shape>>(
        &self,
        num_blocks: usize,
        entries: impl IntoIterator<Item = (N, S, DType)>,
    ) -> Result<ElasticBlocks> {
        ElasticBlocks::new(self, num_blocks, entries)
    }

    /// Makes the tensors of a paged cache with options; see [`ElasticBlocks::with_options`].
    ///
    /// # Errors
    /// As [`ElasticBlocks::new`].
    pub fn blocks_with_options<N: Into<String>, S: Into<Shape>>(
        &self,
        num_blocks: usize,
        entries: impl IntoIterator<Item = (N, S, DType)>,
        options: ElasticBlocksOptions,
    ) -> Result<ElasticBlocks> {
        ElasticBlocks::with_options(self, num_blocks, entries, options)
    }
}

impl ElasticBlocks {
    /// Makes one tensor per entry: its name, the shape of one block, and the dtype.
    ///
    /// On a CUDA device it reserves addresses and allocates no memory. The pool's reservation size
    /// does not apply.
    ///
    /// # Errors
    /// - [`CandleError`](crate::VmmError::CandleError) with `UnsupportedDTypeForOp` if Candle
    ///   cannot compute with a dtype.
    /// - [`Vmm`](crate::VmmError::Vmm) with `ZeroSize` if there are no blocks, no entries, or a
    ///   block without elements.
    /// - [`Vmm`](crate::VmmError::Vmm) with `Block` around [`BlockError::DuplicateTensor`] or
    ///   [`BlockError::Overflow`].
    /// - [`Vmm`](crate::VmmError::Vmm) with `OutOfPhysicalMemory` if a CPU device has no memory for
    ///   the tensors.
    /// - [`OutOfVirtualMemory`](crate::VmmError::OutOfVirtualMemory), or
    ///   [`Vmm`](crate::VmmError::Vmm) if a driver call fails.
    pub fn new<N: Into<String>, S: Into<Shape>>(
        pool: &TensorPool,
        num_blocks: usize,
        entries: impl IntoIterator<Item = (N, S, DType)>,
    ) -> Result<Self> {
        Self::with_options(pool, num_blocks, entries, ElasticBlocksOptions::new())
    }

    /// As [`new`](Self::new), with options.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    ///
    /// ```
    /// # #[cfg(feature = "simulator")] {
    /// use candle_core::{DType, Device};
    /// use candle_cuda_vmm::{ElasticBlocks, ElasticBlocksOptions, TensorPool};
    ///
    /// let pool = TensorPool::new(&Device::Cpu)?;
    /// let entries = ["k", "v"].map(|name| (name, (16, 8, 64), DType::F16));
    /// let options = ElasticBlocksOptions::new().ahead_blocks_max(256);
    /// let blocks = ElasticBlocks::with_options(&pool, 4096, entries, options)?;
    /// let allocator = blocks.allocator();
    /// // The worker has made the memory by then, and a step calls no driver.
    /// let table = allocator.allocate(16)?;
    /// assert!(blocks.check_table(table).is_ok());
    /// # }
    /// # Ok::<(), candle_cuda_vmm::VmmError>(())
    /// ```
    pub fn with_options<N: Into<String>, S: Into<Shape>>(
        pool: &TensorPool,
        num_blocks: usize,
        entries: impl IntoIterator<Item = (N, S, DType)>,
        options: ElasticBlocksOptions,
    ) -> Result<Self> {
        let (mut tensors, mut dtypes) = (Vec::new(), Vec::new());
        for (name, block_shape, dtype) in entries {
            if matches!(
                dtype,
                DType::F6E2M3 | DType::F6E3M2 | DType::F4 | DType::F8E8M0
            ) {
                return Err(Error::UnsupportedDTypeForOp(dtype, "elastic-blocks").into());
            }
            let element = ElementSize::new(dtype.size_in_bytes())?;
            let block_shape = block_shape.into();
            tensors.push(TensorSpec::new(name, block_shape.dims(), element)?);
            dtypes.push(dtype);
        }
        let sized = (LayerSpec::new(tensors)?, num_blocks);
        let memory = BlockMemory::new(pool.inner(), sized, &dtypes, options)?;
        Ok(Self(Arc::new(ElasticBlocksInner {
            pool: pool.clone(),
            dtypes,
            memory,
        })))
    }

    /// Backs blocks in all tensors. Call it whenever a block is put to use again, backed or not.
    ///
    /// Blocks that are backed already keep their contents. If the call fails, no block is newly
    /// backed.
    ///
    /// # Errors
    /// - [`Vmm`](crate::VmmError::Vmm) with `Block` around [`BlockError::Invalid`] if a block does
    ///   not exist.
    /// - [`Vmm`](crate::VmmError::Vmm) with `Leased` if a prefix still shows a block that was
    ///   unbacked.
    /// - [`Vmm`](crate::VmmError::Vmm) with `OutOfPhysicalMemory` if the budget is exhausted.
    /// - [`Vmm`](crate::VmmError::Vmm) if a driver call fails.
    pub fn back(&self, blocks: impl IntoIterator<Item = BlockId>) -> Result<()> {
        self.0.back(blocks, |blocks| self.backing().back(blocks))
    }

    /// As [`back`](Self::back), but never waits for the device.
    ///
    /// # Errors
    /// As [`back`](Self::back).
    pub fn try_back(&self, blocks: impl IntoIterator<Item = BlockId>) -> Result<()> {
        self.0
            .back(blocks, |blocks| self.backing().try_back(blocks))
    }

    /// As [`back`](Self::back), but waits up to `timeout` for memory, also for what other accounts
    /// are asked to give back.
    ///
    /// # Errors
    /// As [`back`](Self::back).
    pub fn back_timeout(
        &self,
        blocks: impl IntoIterator<Item = BlockId>,
        timeout: Duration,
    ) -> Result<()> {
        self.0.back(blocks, |blocks| {
            self.backing().back_timeout(blocks, timeout)
        })
    }

    /// As [`try_back`](Self::try_back), but frees exactly the blocks that it has newly backed when
    /// the guard is dropped, unless they are [kept](BackedBlocks::keep).
    ///
    /// # Errors
    /// As [`back`](Self::back).
    pub fn try_reserve(&self, blocks: impl IntoIterator<Item = BlockId>) -> Result<BackedBlocks> {
        self.0
            .back(blocks, |blocks| self.backing().try_reserve(blocks))
    }

    /// Frees blocks with their contents. A prefix that shows them keeps their memory.
    ///
    /// It never waits for the device. Work that was queued on Candle's stream before still finds
    /// the blocks. Later work must not touch them.
    ///
    /// # Errors
    /// [`Vmm`](crate::VmmError::Vmm) with `Block` around [`BlockError::Invalid`],
    /// [`BlockError::NotBacked`] or [`BlockError::Pinned`]; then no block is freed.
    pub fn unback(&self, blocks: impl IntoIterator<Item = BlockId>) -> Result<()> {
        Ok(self.backing().unback(blocks)?)
    }

    /// Names the blocks that will be backed next, in this order, so that the engine's worker makes
    /// their memory ahead, up to [`ElasticBlocksOptions::ahead_blocks_max`] blocks. The names hold
    /// until the next call. It calls no driver.
    ///
    /// For an engine with an allocator of its own: name the first blocks of its free list after
    /// each step. [`allocator`](Self::allocator) does so itself.
    ///
    /// # Errors
    /// [`Vmm`](crate::VmmError::Vmm) with `Block` around [`BlockError::Invalid`]; then the names
    /// are as before.
    pub fn prefetch(&self, blocks: impl IntoIterator<Item = BlockId>) -> Result<()> {
        Ok(self.backing().prefetch(blocks)?)
    }

    /// Keeps backed blocks in place until the pin is dropped.
    ///
    /// # Errors
    /// [`Vmm`](crate::VmmError::Vmm) with `Block` around [`BlockError::Invalid`] or
    /// [`BlockError::NotBacked`]; then no block is pinned.
    pub fn pin(&self, blocks: impl IntoIterator<Item = BlockId>) -> Result<BlockPin> {
        Ok(self.backing().pin(blocks)?)
    }

    /// Keeps the blocks that a graph names by itself in place until the pin is dropped.
    ///
    /// Few graphs name any. Kernels that follow a block table find the numbers in it when they run,
    /// so the table is an input of the graph, and another one for each launch. Before each launch,
    /// [back](Self::back) the blocks that the tables name, and queue the launch on Candle's stream.
    /// Blocks that are freed after that stay until the launch has completed. The addresses of the
    /// tensors, which the graph does have, stay as long as these blocks or a pin.
    ///
    /// Pin what is the same in each launch: a block that pads the tables of a smaller batch, or
    /// blocks whose addresses were arguments when the graph was captured. Pin the blocks of a table
    /// too if the graph is launched on another stream, from before the launch until it has
    /// completed. Do not pin all blocks: memory behind a pin is never given back.
    ///
    /// # Errors
    /// As [`pin`](Self::pin).
    pub fn pin_for_graph(&self, blocks: impl IntoIterator<Item = BlockId>) -> Result<BlockPin> {
        self.pin(blocks)
    }

    /// Chooses blocks to evict so that whole pages of at least `bytes` bytes become empty; see
    /// [`BlockBacking::reclaim_candidates`].
    ///
    /// On a CUDA device it chooses no block that a living prefix shows.
    ///
    /// [`BlockBacking::reclaim_candidates`]:
    /// cuda_vmm::pool::blocks::BlockBacking::reclaim_candidates
    pub fn reclaim_candidates(
        &self,
        bytes: usize,
        cost: impl Fn(BlockId) -> Option<f64>,
    ) -> ReclaimPlan {
        self.backing().reclaim_candidates(bytes, cost)
    }

    /// As [`reclaim_candidates`](Self::reclaim_candidates), but may also move blocks, at a cost of
    /// `move_cost` each.
    pub fn reclaim_candidates_with_moves(
        &self,
        bytes: usize,
        move_cost: f64,
        cost: impl Fn(BlockId) -> Option<f64>,
    ) -> ReclaimPlan {
        let backing = self.backing();
        backing.reclaim_candidates_with_moves(bytes, move_cost, cost)
    }

    /// Carries out a plan: copies the blocks that move, on Candle's stream, and frees those that
    /// are evicted and those that have moved.
    ///
    /// Update the block tables afterwards. The call never waits for the device.
    ///
    /// # Errors
    /// [`Vmm`](crate::VmmError::Vmm) with any error of
    /// [`BlockBacking::commit`](cuda_vmm::pool::blocks::BlockBacking::commit); then nothing has
    /// changed.
    pub fn commit(&self, plan: &ReclaimPlan) -> Result<()> {
        let backing = self.backing();
        (self.0.memory).commit(plan, |stream| backing.commit(plan, stream))
    }

    /// Checks that all blocks of a table exist and are backed. It calls no driver.
    ///
    /// Use it before each launch over [`reserved_tensors`](Self::reserved_tensors), to find a
    /// mistake before it makes the context unusable:
    /// `debug_assert!(blocks.check_table(table).is_ok())`, or in every build.
    ///
    /// # Errors
    /// [`Vmm`](crate::VmmError::Vmm) with `Block` around [`BlockError::Invalid`] or
    /// [`BlockError::NotBacked`] for the first block that cannot be used.
    pub fn check_table(&self, table: impl IntoIterator<Item = BlockId>) -> Result<()> {
        let blocks = self.num_blocks();
        let check = |block| match block < blocks {
            true if self.is_backed(block) => Ok(()),
            true => Err(BlockError::NotBacked { block }),
            false => Err(BlockError::Invalid { block, blocks }),
        };
        let checked = table.into_iter().try_for_each(check);
        Ok(checked.map_err(cuda_vmm::VmmError::Block)?)
    }

    /// Returns a contiguous view `[n, block shape…]` of one tensor: the first `n` blocks, all that
    /// are backed without a gap.
    ///
    /// In-place writes (`slice_set`) write to the blocks. On a CUDA device its memory is held until
    /// the view, and every tensor made from it, is dropped. Until then no plan moves other blocks
    /// into it, even if its blocks are unbacked. On a CPU device the lifetime of a view is not
    /// tracked, so its blocks may be reused while it lives.
    ///
    /// # Errors
    /// - [`Vmm`](crate::VmmError::Vmm) with `Block` around [`BlockError::UnknownTensor`], or around
    ///   [`BlockError::NotBacked`] if another thread frees a block during the call.
    /// - [`CandleError`](crate::VmmError::CandleError) if Candle fails.
    pub fn prefix(&self, name: &str) -> Result<Tensor> {
        self.prefix_of(self.backing().index_of(name)?)
    }

    /// As [`prefix`](Self::prefix), for the tensor of this index among the entries.
    ///
    /// # Errors
    /// As [`prefix`](Self::prefix), but [`BlockError::InvalidTensor`] if there is no such index.
    pub fn prefix_of(&self, index: usize) -> Result<Tensor> {
        let (tensor, tensors) = (index, self.0.dtypes.len());
        let dtype = self.0.dtypes.get(index).copied();
        let error = BlockError::InvalidTensor { tensor, tensors };
        let dtype = dtype.ok_or(cuda_vmm::VmmError::Block(error))?;
        // Fails if they are asleep.
        let _hold = self.backing().hold()?;
        self.0.memory.prefix(index, self.backed_prefix(), dtype)
    }

    /// Returns all tensors, `[num_blocks, block shape…]` each, in the order of the entries, for
    /// kernels that follow block tables.
    ///
    /// Shapes and addresses are the same at each call and never change. Only backed blocks have
    /// memory; a tensor may have gaps. If one of the tensors outlives this object and all its
    /// clones, the addresses and the memory of backed blocks are never freed.
    ///
    /// # Errors
    /// [`CandleError`](crate::VmmError::CandleError) if Candle fails.
    ///
    /// # Safety
    /// On a CUDA device, as long as one of the tensors, or a view or clone of it, lives:
    /// - Kernels and copies touch backed blocks only. From before they are queued until they have
    ///   completed, no [`unback`](Self::unback) or [`commit`](Self::commit) frees those blocks,
    ///   unless the work was queued before on Candle's stream. [`check_table`](Self::check_table)
    ///   finds mistakes; [`pin`](Self::pin) prevents them.
    /// - The blocks are [asleep](Self::sleep) at no time between.
    /// - No operation reads the whole storage while one of its blocks is not backed. Nearly every
    ///   operation on the tensor itself does: arithmetic, `to_dtype`, `contiguous`, printing.
    ///   Candle's `to_vec*`, `to_scalar`, `to_device` and `copy` read the whole storage even of a
    ///   `narrow` to backed blocks, so call `force_contiguous` on that first. `slice_set`,
    ///   `index_select` and `gather` along dimension 0 touch only the blocks that they are given.
    ///
    /// An access to a block that is not backed is an access to an unmapped address. It makes the
    /// context unusable.
    #[allow(unsafe_code)]
    pub unsafe fn reserved_tensors(&self) -> Result<Vec<Tensor>> {
        // SAFETY: the caller's promise.
        unsafe { self.0.memory.reserved(&self.0.dtypes) }
    }

    /// Returns whether a block is backed; `false` if there is no such block.
    pub fn is_backed(&self, block: BlockId) -> bool {
        self.backing().is_backed(block)
    }

    /// Returns how many blocks, from block 0 on, are backed without a gap.
    pub fn backed_prefix(&self) -> usize {
        self.backing().backed_prefix()
    }

    /// Returns the number of blocks.
    pub fn num_blocks(&self) -> usize {
        self.backing().blocks()
    }

    /// Returns the names of the tensors, in the order of the entries.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let tensors = self.backing().tensors().iter();
        tensors.map(|tensor| tensor.name())
    }

    /// Returns how many blocks are backed and pinned, and how much memory the device holds for
    /// them.
    pub fn stats(&self) -> BlockStats {
        self.backing().stats()
    }

    /// Gives the memory of all blocks to others. The addresses stay, the same blocks are backed when
    /// they [wake](Self::wake), and their contents are there if they are kept: see
    /// [`BlockBacking::sleep`]. Synchronise the device before, as queued work keeps them awake. On a
    /// CPU device the tensors stay as they are.
    ///
    /// # Errors
    /// [`Vmm`](crate::VmmError::Vmm) as [`BlockBacking::sleep`], with `KeptAwake` if a view is left
    /// or a launch is under way. Then all blocks are awake.
    pub fn sleep(&self, keep: Keep<'_>) -> Result<Slept> {
        Ok(self.backing().sleep(keep)?)
    }

    /// Has the memory of all blocks at their addresses again: see [`BlockBacking::wake`].
    ///
    /// # Errors
    /// [`Vmm`](crate::VmmError::Vmm) as [`BlockBacking::wake`]. Then all blocks are asleep as they
    /// were.
    pub fn wake(&self, options: &WakeOptions) -> Result<()> {
        Ok(self.backing().wake(options)?)
    }

    /// Returns whether the blocks are asleep.
    pub fn is_asleep(&self) -> bool {
        self.backing().is_asleep()
    }

    /// Returns the core's record of the blocks, with their leases and statistics by tensor. Carry
    /// out plans by [`commit`](Self::commit), which also moves the blocks of a CPU device.
    pub fn backing(&self) -> &BlockBacking {
        self.0.memory.backing()
    }

    /// Returns an allocator of all blocks, none of which is backed yet. It prefers backed blocks,
    /// so that the blocks in use fill whole pages.
    pub fn allocator(&self) -> ElasticBlockAllocator {
        ElasticBlockAllocator::new(self)
    }

    /// Returns the account that the memory of the blocks is charged to: the pool's.
    pub fn account(&self) -> &Account {
        self.backing().account()
    }

    /// Returns the engine behind the blocks, which is the pool's.
    pub fn engine(&self) -> &Engine {
        self.backing().engine()
    }

    /// Returns the pool.
    pub fn pool(&self) -> &TensorPool {
        &self.0.pool
    }
}
