//! Backing for block tables: which blocks of a paged cache have memory behind them.
//!
//! An engine with a paged cache keeps one tensor for each layer's keys, one for its values,
//! `num_blocks` outermost, and hands out block numbers. [`BlockBacking`] gives those tensors their
//! full addresses for life and memory only where blocks are in use. It is no allocator of blocks.
//! The engine above says which blocks to back, which to give up, and at what cost. It rewrites its
//! own tables.
//!
//! - [`back`](BlockBacking::back) backs blocks in all tensors or in none.
//! - A block that is no longer used stays backed, with its contents, until a plan that names it is
//!   committed. So a prefix cache stays warm until the memory is needed.
//! - [`reclaim_candidates`](BlockBacking::reclaim_candidates) chooses what to evict so that whole
//!   pages empty, at the least cost;
//!   [`reclaim_candidates_with_moves`](BlockBacking::reclaim_candidates_with_moves) may move blocks
//!   into backed ones of no value. [`commit`](BlockBacking::commit) does it.
//! - [`pin`](BlockBacking::pin) keeps blocks out of every plan, and [`hold`](BlockBacking::hold)
//!   keeps all of them where they are while work is launched.
//!
//! An engine without an allocator of its own takes [`BlockAllocator`], which packs.
//!
//! ```
//! # #[cfg(feature = "simulator")] {
//! use cuda_vmm::pool::blocks::{BlockBacking, ElementSize, LayerSpec, TensorSpec};
//! use cuda_vmm::{Driver, Engine, EngineOptions, Stream};
//!
//! let device = Driver::detect()?.device(0)?;
//! let engine = Engine::new(&device, EngineOptions::new())?;
//! let f16 = ElementSize::new(2)?;
//! // [size, heads, dim] for keys and values of one layer.
//! let spec = LayerSpec::new([
//!     TensorSpec::new("k", &[16, 8, 128], f16)?,
//!     TensorSpec::new("v", &[16, 8, 128], f16)?,
//! ])?;
//! let backing = BlockBacking::new(&engine, spec, 1 << 20, device.granularity_bytes())?;
//! backing.back(0..1000)?;
//! // They are not needed any more.
//! let plan = backing.reclaim_candidates(usize::MAX, |_block| Some(0.0));
//! backing.commit(&plan, &Stream::new(&device)?)?;
//! assert_eq!(backing.stats().backed_blocks, 0);
//! # }
//! # Ok::<(), cuda_vmm::VmmError>(())
//! ```

mod allocator;
mod backed;
mod backing;
mod block_states;
mod commit;
mod hold;
mod layer_spec;
mod layout;
mod memory;
mod options;
mod packing;
mod pin;
mod plan;
mod reclaim;
mod runs;
mod sleep;
mod stats;
mod tensor;
mod zero;

pub use crate::error::BlockError;
pub use allocator::BlockAllocator;
pub use backed::BackedBlocks;
pub use backing::BlockBacking;
pub use hold::BlockHold;
pub use layer_spec::{ElementSize, LayerSpec, TensorSpec};
pub use options::BlockOptions;
pub use pin::BlockPin;
pub use plan::ReclaimPlan;
pub use stats::BlockStats;
pub use tensor::BlockTensor;

/// The number of a block: its place in the outermost dimension of every tensor.
pub type BlockId = usize;
