//! The tensors of a paged cache, with memory for the blocks in use.

mod memory;

use crate::error::Result;
use crate::tensor_pool::TensorPool;
use candle_core::{DType, Error, Shape, Tensor};
use cuda_vmm::Engine;
use cuda_vmm::pool::blocks::{
    BlockError, BlockId, BlockPin, BlockStats, ElementSize, LayerSpec, ReclaimPlan, TensorSpec,
};
use memory::Memory;
use std::sync::Arc;

/// The tensors of a paged cache: `[num_blocks, block shape…]` each, with memory for the blocks that are backed; a cheap
/// clone.
///
/// It takes the place of tensors that were allocated for all blocks at once. Block numbers, tables, and who uses a block
/// stay the engine's own: it [backs](Self::back) blocks before it uses them, and where memory is to go back it asks
/// [which blocks to evict](Self::reclaim_candidates), [commits](Self::commit) that, and rewrites its tables. It is
/// [`cuda_vmm::pool::blocks`] over Candle's stream; what is said there of pages, plans and pins holds here.
///
/// Kernels get the tensors in one of two ways. [`prefix`](Self::prefix) is safe: the blocks from the first on that are
/// backed without a gap. [`reserved_tensors`](Self::reserved_tensors) are all blocks, backed or not, for as long as the
/// cache lives, and unsafe. What a backed block holds is undefined until it is written.
///
/// On a CPU device there are plain tensors of all `num_blocks`, allocated when it is made, and results are the same. Which
/// blocks are backed, what a plan frees and all of [`stats`](Self::stats) are kept on the simulated driver as they would be
/// on a GPU, under the pool's limit but not against its [`committed_bytes`](TensorPool::committed_bytes); memory of the host
/// does not follow them. That takes the feature `simulator`.
///
/// ```
/// # #[cfg(feature = "simulator")] {
/// use candle_core::{DType, Device, Tensor};
/// use candle_cuda_vmm::TensorPool;
///
/// let pool = TensorPool::new(&Device::Cpu)?; // or `Device::new_cuda(0)?`
/// // [size, heads, dim] for one layer's keys and values, and addresses for 4096 blocks.
/// let blocks = pool.blocks(4096, [("k", (16, 8, 64), DType::F16), ("v", (16, 8, 64), DType::F16)])?;
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
/// // Before: `Tensor::zeros((4096, 16, 8, 128), DType::F16, &device)?` for each of the four, 512 MiB in all.
/// let shape = (16, 8, 128);
/// let entries = ["0.k", "0.v", "1.k", "1.v"].map(|name| (name, shape, DType::F16));
/// let cache = pool.blocks(4096, entries)?;
/// // SAFETY: kernels get tables of backed blocks only, and nothing takes one of these tensors whole.
/// # #[allow(unused_variables)]
/// let tensors = unsafe { cache.reserved_tensors()? }; // [4096, 16, 8, 128] each, at the same addresses for life
///
/// // Sixteen sequences of 64 blocks. The engine's allocator has chosen them, and now they get memory.
/// let mut tables: Vec<Vec<usize>> = (0..16).map(|at| (64 * at..64 * at + 64).collect()).collect();
/// for table in &tables {
///     cache.back(table.iter().copied())?;
///     debug_assert!(cache.check_table(table.iter().copied()).is_ok());
///     // Launch the kernels with `tensors` and this table, as before.
/// }
/// assert_eq!(cache.stats().committed_bytes, 128 << 20); // of 512 MiB
///
/// // All but two have ended. Their blocks keep what they hold, for a prompt that begins alike, until memory is wanted
/// // elsewhere. Then the least valuable blocks go, and those in use may move.
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
/// cache.engine().step(); // a worker does so too, a little later
/// assert_eq!(cache.stats().committed_bytes, 16 << 20);
/// # }
/// # Ok::<(), candle_cuda_vmm::VmmError>(())
/// ```
#[derive(Debug, Clone)]
pub struct ElasticBlocks(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    pool: TensorPool,
    dtypes: Vec<DType>,
    memory: Memory,
}

impl ElasticBlocks {
    /// One tensor for each entry: its name, the shape of one block, and the type of the elements. On a CUDA device it
    /// reserves addresses and takes no memory; the pool's reservation size does not count here.
    ///
    /// # Errors
    /// - [`CandleError`](crate::VmmError::CandleError) with `UnsupportedDTypeForOp` for a type of which Candle has no
    ///   tensors that it computes with.
    /// - [`Vmm`](crate::VmmError::Vmm) with `ZeroSize` for no blocks, no entries or a block without elements, with
    ///   `Block` around `DuplicateTensor` or `Overflow`, and if a driver call fails;
    ///   [`OutOfVirtualMemory`](crate::VmmError::OutOfVirtualMemory).
    /// - [`UnsupportedDevice`](crate::VmmError::UnsupportedDevice) for a CPU device without the feature `simulator`.
    pub fn new<N: Into<String>, S: Into<Shape>>(
        pool: &TensorPool,
        num_blocks: usize,
        entries: impl IntoIterator<Item = (N, S, DType)>,
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
        let memory = Memory::new(pool.inner(), LayerSpec::new(tensors)?, num_blocks, &dtypes)?;
        Ok(Self(Arc::new(Inner {
            pool: pool.clone(),
            dtypes,
            memory,
        })))
    }

    /// Backs blocks in all tensors, or, if that fails, none of them; those that are backed already keep what they hold.
    /// Call it whenever a block is put to use again, backed or not.
    ///
    /// # Errors
    /// [`Vmm`](crate::VmmError::Vmm) with `Block` around [`BlockError::Invalid`], with `Leased` for a block that was given up
    /// while a prefix showed it and still does, with `OutOfPhysicalMemory` if the budget has no
    /// room, and if a driver call fails.
    pub fn back(&self, blocks: impl IntoIterator<Item = BlockId>) -> Result<()> {
        self.0.memory.back(blocks)
    }

    /// Gives blocks up with their contents; a prefix that shows them keeps them. Never waits for the device. Work queued
    /// on Candle's stream before still finds them; work that Candle is given later must not touch them.
    ///
    /// # Errors
    /// [`Vmm`](crate::VmmError::Vmm) with `Block` around [`BlockError::Invalid`], [`BlockError::NotBacked`] or
    /// [`BlockError::Pinned`], and then none is given up.
    pub fn unback(&self, blocks: impl IntoIterator<Item = BlockId>) -> Result<()> {
        Ok(self.0.memory.backing().unback(blocks)?)
    }

    /// Keeps blocks, all of them backed, where they are until the pin is dropped.
    ///
    /// # Errors
    /// [`Vmm`](crate::VmmError::Vmm) with `Block` around [`BlockError::Invalid`] or [`BlockError::NotBacked`], and then
    /// none is pinned.
    pub fn pin(&self, blocks: impl IntoIterator<Item = BlockId>) -> Result<BlockPin> {
        Ok(self.0.memory.backing().pin(blocks)?)
    }

    /// Keeps what a graph touches where it is: all blocks that its kernels read or write, in whatever table, for the
    /// life of the pin. Hold it as long as the graph can be launched, and until its last launch has run.
    ///
    /// The tensors that the graph was captured with need not live as long: it has addresses only, and those stay while the
    /// pin lives, whatever else is dropped.
    ///
    /// # Errors
    /// As [`pin`](Self::pin).
    pub fn pin_for_graph(&self, blocks: impl IntoIterator<Item = BlockId>) -> Result<BlockPin> {
        self.pin(blocks)
    }

    /// Chooses blocks to evict so that at least `bytes` bytes of whole pages empty; see
    /// [`BlockBacking::reclaim_candidates`](cuda_vmm::pool::blocks::BlockBacking::reclaim_candidates). Blocks that a living
    /// prefix shows are left alone, on a CUDA device.
    pub fn reclaim_candidates(
        &self,
        bytes: usize,
        cost: impl Fn(BlockId) -> Option<f64>,
    ) -> ReclaimPlan {
        self.0.memory.backing().reclaim_candidates(bytes, cost)
    }

    /// As [`reclaim_candidates`](Self::reclaim_candidates), but blocks may also be moved, for `move_cost` each.
    pub fn reclaim_candidates_with_moves(
        &self,
        bytes: usize,
        move_cost: f64,
        cost: impl Fn(BlockId) -> Option<f64>,
    ) -> ReclaimPlan {
        let backing = self.0.memory.backing();
        backing.reclaim_candidates_with_moves(bytes, move_cost, cost)
    }

    /// Carries out a plan: copies what moves, on Candle's stream, and gives up what is evicted and what was moved away.
    /// Tables must name the new places afterwards. Never waits for the device.
    ///
    /// # Errors
    /// [`Vmm`](crate::VmmError::Vmm) with what
    /// [`BlockBacking::commit`](cuda_vmm::pool::blocks::BlockBacking::commit) returns, after which all is as before.
    pub fn commit(&self, plan: &ReclaimPlan) -> Result<()> {
        self.0.memory.commit(plan)
    }

    /// Fails unless all blocks of a table exist and are backed. For use before each launch over
    /// [`reserved_tensors`](Self::reserved_tensors) where a mistake is to be found and not to end the context:
    /// `debug_assert!(blocks.check_table(table).is_ok())`, or always. It looks at each block once and calls no driver.
    ///
    /// # Errors
    /// [`Vmm`](crate::VmmError::Vmm) with `Block` around [`BlockError::Invalid`] or [`BlockError::NotBacked`] for the first
    /// block of the table that cannot be used.
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

    /// A view `[n, block shape…]` of one tensor: the `n` blocks from the first on that are backed without a gap now,
    /// contiguous. Writing to it in place (`slice_set`) writes to the blocks.
    ///
    /// On a CUDA device it is a snapshot of places: its memory stays until it and all that was made of it are dropped,
    /// whatever is given up, committed or dropped before, and no plan moves other blocks into it. On a CPU device, where
    /// nobody can tell how long a view lives, a block that it shows may be reused under it.
    ///
    /// # Errors
    /// [`Vmm`](crate::VmmError::Vmm) with `Block` around [`BlockError::UnknownTensor`], or [`BlockError::NotBacked`] if another
    /// thread gives a block up meanwhile; [`CandleError`](crate::VmmError::CandleError).
    pub fn prefix(&self, name: &str) -> Result<Tensor> {
        self.prefix_of(self.0.memory.backing().index_of(name)?)
    }

    /// As [`prefix`](Self::prefix), of the tensor of this index among the entries.
    ///
    /// # Errors
    /// As there, but [`BlockError::InvalidTensor`] for an index that no tensor has.
    pub fn prefix_of(&self, index: usize) -> Result<Tensor> {
        let (tensor, tensors) = (index, self.0.dtypes.len());
        let dtype = self.0.dtypes.get(index).copied();
        let error = BlockError::InvalidTensor { tensor, tensors };
        let dtype = dtype.ok_or(cuda_vmm::VmmError::Block(error))?;
        self.0.memory.prefix(index, self.backed_prefix(), dtype)
    }

    /// All tensors, `[num_blocks, block shape…]` each, in the order of the entries. Shapes and addresses are the same at
    /// each call and stay for life; there is memory only behind backed blocks, and none may be in the middle.
    ///
    /// They are for kernels that follow block tables. Should one of them outlive this object and all its clones, then the
    /// addresses, and the memory of blocks that were backed, are never given back.
    ///
    /// # Errors
    /// [`CandleError`](crate::VmmError::CandleError).
    ///
    /// # Safety
    /// On a CUDA device, for as long as one of the tensors, or a view or clone of it, lives:
    /// - Kernels and copies touch backed blocks only: from before they are queued until they have run, nobody gives those
    ///   blocks up, by [`unback`](Self::unback) or [`commit`](Self::commit), unless the work is on Candle's stream and
    ///   was queued before. [`check_table`](Self::check_table) finds mistakes; [`pin`](Self::pin) prevents them.
    /// - No operation takes the whole storage while one of its blocks is not backed. Of the tensor itself that is nearly
    ///   every one: arithmetic, `to_dtype`, `contiguous`, printing. Candle's `to_vec*`, `to_scalar`, `to_device` and
    ///   `copy` take the whole storage even of a `narrow` to backed blocks: call `force_contiguous` on that first.
    ///   `slice_set`, `index_select` and `gather` along dimension 0 touch only the blocks that they are told.
    ///
    /// Touching a block that is not backed is an access to an unmapped address: the context is beyond use after it.
    #[allow(unsafe_code)]
    pub unsafe fn reserved_tensors(&self) -> Result<Vec<Tensor>> {
        // SAFETY: the caller's promise.
        unsafe { self.0.memory.reserved(&self.0.dtypes) }
    }

    /// Whether a block is backed; false for numbers that no block has.
    pub fn is_backed(&self, block: BlockId) -> bool {
        self.0.memory.backing().is_backed(block)
    }

    /// How many blocks, from block 0 on, are backed without a gap.
    pub fn backed_prefix(&self) -> usize {
        self.0.memory.backing().backed_prefix()
    }

    /// How many blocks there are.
    pub fn num_blocks(&self) -> usize {
        self.0.memory.backing().blocks()
    }

    /// Names of the tensors, in the order of the entries.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let tensors = self.0.memory.backing().tensors().iter();
        tensors.map(|tensor| tensor.name())
    }

    /// How many blocks are backed and pinned, and what the device holds for them.
    pub fn stats(&self) -> BlockStats {
        self.0.memory.backing().stats()
    }

    /// The engine behind the blocks: on a CUDA device the pool's, on a CPU device one of its own on the simulated driver.
    pub fn engine(&self) -> &Engine {
        self.0.memory.backing().engine()
    }

    /// The pool.
    pub fn pool(&self) -> &TensorPool {
        &self.0.pool
    }
}
