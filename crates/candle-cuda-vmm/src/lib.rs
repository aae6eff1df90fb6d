//! Tensors, KV caches and paged caches for [Candle](candle_core) that grow in place: addresses are there from the start and
//! never move, and memory follows what is in use.
//!
//! A [`TensorPool`] is one budget of memory on one device. An [`ElasticKvCache`] of it has the methods of Candle's own
//! cache, and grows where it stands:
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_cuda_vmm::{Result, TensorPool};
//!
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
//! An [`ElasticTensor`] grows by rows, and [`ElasticBlocks`] are the tensors of a paged cache. For programs that launch
//! their own kernels, [`VirtualMemoryPool`] hands out the addresses of one range, and [`SharedMemoryPool`] those of many
//! models under one limit.
//!
//! # Where things are
//! - [`TensorPool`], [`ElasticTensor`], [`ElasticKvCache`]: tensors and caches that grow.
//! - [`virtual_memory`]: the two pools and their statistics.
//! - [`device`]: which driver serves which Candle device.
//! - [`error`]: what can go wrong.
//! - [`kv_cache`]: what a model asks of a KV cache, and who makes one for each layer.
//! - [`ElasticBlocks`]: the tensors of a paged cache, with memory for the blocks in use.
//! - [`attention`]: grouped-query attention over K and V where they stand.
//! - [`relief`]: making room between Candle's own allocations and the pools.
//! - [`mapping`], [`physical_memory`]: one reservation, one piece of memory, and putting the one behind
//!   the other by hand.
//! - [`cuda_ffi`]: the driver's calls, nearly as they are.
//!
//! The pools are those of [`cuda_vmm`], which knows nothing of Candle; [`VirtualMemoryPool::core`] and
//! [`SharedMemoryPool::core`] lead there. Only [`cuda_ffi`] and [`mapping`] call the
//! driver themselves, through the core's table, and [`relief`], which trims Candle's memory by Candle's own cudarc.
//!
//! # Features
//! - `bindgen` (on by default): the driver's types come from the machine's `cuda.h`, which the build then needs, with
//!   libclang. Without it they are declared by hand, the interface is the same, and the build needs no more than Candle's.
//! - `simulator` (on by default): CPU devices work, over one simulated driver for the process.
//! - `serde`: the pools' snapshots can be written and read ([`cuda_vmm::Snapshot`]).
//! - `cuda`: CUDA devices work; turns on Candle's feature `cuda`. Candle's kernels and this crate's need `nvcc` to build.
//!
//! A CUDA device never gets the simulated driver, and a GPU that fails to answer is an error.
//!
//! # What this crate does not do
//! [`VirtualMemoryPool`] and [`SharedMemoryPool`] hand out addresses, not tensors. Reading or writing through an address is
//! the caller's, and unsafe.

#![cfg_attr(docsrs, feature(doc_cfg))]
#![deny(unsafe_code)]

#[cfg(feature = "cuda")]
mod append;
pub mod attention;
pub mod cuda_ffi;
pub mod device;
mod elastic_blocks;
mod elastic_tensor;
pub mod error;
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
mod tensor_pool;
pub mod virtual_memory;
mod zeros;

pub use cuda_ffi::AccessFlags;
pub use elastic_blocks::ElasticBlocks;
pub use elastic_tensor::ElasticTensor;
pub use error::{Result, Shortage, VmmError};
pub use kv_cache::{ElasticCache, ElasticKvCache};
pub use mapping::{VirtualAddressRange, map_memory, set_memory_access, unmap_memory};
pub use physical_memory::PhysicalMemoryHandle;
pub use relief::{let_candle_make_room, trim_candle_memory};
pub use tensor_pool::{TensorPool, TensorPoolOptions};
pub use virtual_memory::{GlobalMemoryStats, MemoryStats, SharedMemoryPool, VirtualMemoryPool};

/// The core crate, for its types: statistics, devices, streams.
pub use cuda_vmm;

/// This crate's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Whether device 0 of the default driver has virtual memory management.
///
/// The default driver is the real one with the feature `cuda`, otherwise the simulated one. `false`
/// where there is neither, or where the driver fails: [`device::default_driver`] says how.
pub fn is_vmm_supported() -> bool {
    cuda_ffi::get_recommended_granularity(0).is_ok()
}

#[cfg(all(doctest, feature = "simulator", not(feature = "cuda")))]
#[doc = include_str!("../README.md")]
mod readme {}

#[cfg(all(doctest, feature = "simulator", not(feature = "cuda")))]
#[doc = include_str!("../MIGRATION.md")]
mod migration {}
