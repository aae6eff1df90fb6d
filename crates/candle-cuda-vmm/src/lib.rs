//! Tensors, KV caches and paged caches for [Candle](candle_core) that grow in place: their
//! addresses never move, and only the part in use has memory.
//!
//! A [`TensorPool`] has one memory budget on one device. An [`ElasticKvCache`] takes its memory
//! from that pool and has the methods of Candle's own cache:
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_cuda_vmm::{Result, TensorPool};
//!
//! # #[cfg(not(feature = "simulator"))]
//! # fn main() {}
//! # #[cfg(feature = "simulator")]
//! # fn main() -> Result<()> {
//! let device = Device::Cpu; // with the feature `cuda`: `Device::new_cuda(0)?`
//! let pool = TensorPool::new(&device)?;
//! let mut cache = pool.kv_cache(2, 131_072); // instead of `KvCache::new(2, 131_072)`
//!
//! let token = Tensor::ones((1, 8, 1, 128), DType::F32, &device)?;
//! let (k, _v) = cache.append(&token, &token)?;
//! assert_eq!(k.dims(), [1, 8, 1, 128]);
//! # Ok(())
//! # }
//! ```
//!
//! An [`ElasticTensor`] grows by rows. [`ElasticBlocks`] holds the tensors of a paged cache. For
//! programs that launch their own kernels, [`VirtualMemoryPool`] provides the addresses of one
//! range, and [`SharedMemoryPool`] those of many models under one limit.
//!
//! # Modules
//! - [`TensorPool`], [`ElasticTensor`], [`ElasticKvCache`], [`ElasticBlocks`]: tensors and caches
//!   that grow.
//! - [`kv_cache`]: the traits that let a model run with any KV cache.
//! - [`attention`]: grouped-query attention that reads K and V in place, of one sequence or of a
//!   batch in rows, caches or blocks.
//! - [`fused`]: what a layer does between its products, by one launch each.
//! - [`sampling`]: draws tokens from logits on the device.
//! - [`graph`]: a decode step that is captured once and runs while caches grow.
//! - [`virtual_memory`]: the two pools of addresses, and their statistics.
//! - [`relief`]: moves memory between Candle's own allocations and the pools.
//! - [`device`]: maps a Candle device to a driver.
//! - [`error`]: the errors.
//! - [`mapping`], [`physical_memory`]: reservations and physical memory, mapped by hand.
//! - [`cuda_ffi`]: thin wrappers of driver calls.
//!
//! The pools are those of [`cuda_vmm`], which does not depend on Candle.
//! [`VirtualMemoryPool::core`] and [`SharedMemoryPool::core`] give access to them. `cuda_vmm` has
//! the glossary of the terms used here.
//!
//! # Features
//! - `bindgen` (on by default): the driver's types come from the machine's `cuda.h`. The build then
//!   needs that header and libclang. Without this feature hand-written declarations with the same
//!   interface are used.
//! - `simulator` (on by default): CPU devices work. They share one simulated driver per process.
//! - `serde`: the pools' snapshots ([`Snapshot`]) implement `Serialize` and `Deserialize`.
//! - `cuda`: CUDA devices work. It turns on Candle's feature `cuda`. Candle's kernels and this
//!   crate's need `nvcc` to build.
//! - `attention`: [`attention::decode`] and [`attention::write`] work on GPUs of compute capability
//!   8.0 or newer, and so does [`sampling::sample`]. [`fused`] has kernels there. It turns on `cuda`.
//!
//! A CUDA device never gets the simulated driver. If a GPU fails, the call returns an error.
//!
//! # What this crate does not do
//! [`VirtualMemoryPool`] and [`SharedMemoryPool`] return addresses, not tensors. Reads and writes
//! through such an address are unsafe and up to the caller.

#![cfg_attr(docsrs, feature(doc_cfg))]
#![deny(unsafe_code)]

#[cfg(feature = "cuda")]
mod append;
pub mod attention;
pub mod cuda_ffi;
pub mod device;
mod elastic_blocks;
mod elastic_tensor;
mod elastic_weights;
pub mod error;
pub mod fused;
pub mod graph;
#[cfg(feature = "cuda")]
mod kernels;
pub mod kv_cache;
#[cfg(feature = "cuda")]
mod lease;
pub mod mapping;
#[cfg(feature = "cuda")]
mod order;
pub mod physical_memory;
pub mod relief;
pub mod sampling;
mod tensor_pool;
pub mod virtual_memory;
mod zeros;

pub use cuda_ffi::AccessFlags;
pub use elastic_blocks::{ElasticBlockAllocator, ElasticBlocks, ElasticBlocksOptions};
pub use elastic_tensor::{ElasticTensor, RowsWatch};
pub use elastic_weights::{
    ElasticModel, ElasticWeights, WeightsArriving, WeightsOptions, weights_in,
};
pub use error::{Result, Shortage, VmmError, WeightsError};
pub use kv_cache::{ElasticCache, ElasticKvCache, ElasticRotatingKvCache, Sequence, SequenceCache};
pub use mapping::{VirtualAddressRange, map_memory, set_memory_access, unmap_memory};
pub use physical_memory::PhysicalMemoryHandle;
pub use relief::{keep_candle_memory, let_candle_make_room, trim_candle_memory};
pub use tensor_pool::{TensorPool, TensorPoolOptions};
pub use virtual_memory::{GlobalMemoryStats, MemoryStats, SharedMemoryPool, VirtualMemoryPool};

/// The core crate, [`cuda_vmm`](https://docs.rs/cuda-vmm). Its names that this crate's functions
/// use are also here: except for `Device`, `VmmError` and the two pools, of which this crate has
/// its own.
pub use cuda_vmm;

pub use cuda_vmm::pool::blocks::{
    BackedBlocks, BlockAllocator, BlockBacking, BlockError, BlockId, BlockPin, BlockStats,
    ReclaimPlan,
};
#[cfg(feature = "simulator")]
pub use cuda_vmm::sim;
pub use cuda_vmm::{
    Account, AccountSnapshot, AccountStats, CaptureGuard, Demand, Driver, Engine, EngineCounters,
    EngineOptions, EngineStats, Givable, GraphPin, HostStore, HostStoreOptions, Keep, MemoryParts,
    PoolCounters, PoolOptions, PoolStats, Quota, Snapshot, StepReport, Stream, WakeOptions,
    WorkerMode, sys,
};

/// This crate's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Returns whether device 0 of the default driver has virtual memory management.
///
/// The default driver is the real one with the feature `cuda`, otherwise the simulated one. Returns
/// `false` if there is no driver or if the driver fails; [`device::default_driver`] returns the
/// reason.
pub fn is_vmm_supported() -> bool {
    cuda_ffi::get_recommended_granularity(0).is_ok()
}

#[cfg(all(doctest, feature = "simulator", not(feature = "cuda")))]
#[doc = include_str!("../README.md")]
mod readme {}

#[cfg(all(doctest, feature = "simulator", not(feature = "cuda")))]
#[doc = include_str!("../MIGRATION.md")]
mod migration {}
