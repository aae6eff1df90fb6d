//! Elastic GPU memory for [Candle](candle_core): reserve far more address space than there is memory,
//! and back only the part in use.
//!
//! A KV cache does not know how long it will get. [`VirtualMemoryPool`] reserves addresses for the
//! longest and takes memory as tokens come; [`SharedMemoryPool`] does so for many models under one
//! limit of physical memory. Addresses never move.
//!
//! ```
//! use candle_core::Device;
//! use candle_cuda_vmm::{Result, VirtualMemoryPool};
//!
//! # fn main() -> Result<()> {
//! # #[cfg(feature = "simulator")] {
//! // `Device::new_cuda(0)?` with the feature `cuda`. A CPU device is served by a simulated driver.
//! let device = Device::Cpu;
//! let mut pool = VirtualMemoryPool::new(
//!     128 * 1024 * 1024 * 1024, // 128 GiB of addresses
//!     2 * 1024 * 1024,          // in pages of 2 MiB
//!     device,
//! )?;
//! let address = pool.allocate(0, 1024 * 1024 * 1024)?; // 1 GiB of memory
//! println!("at {address:#x}, {} bytes in use", pool.physical_memory_usage());
//! pool.deallocate(0, 1024 * 1024 * 1024)?;
//! # }
//! # Ok(())
//! # }
//! ```
//!
//! Tensors come from a [`TensorPool`]: an [`ElasticTensor`] grows by rows where it stands, and an
//! [`ElasticKvCache`] is one of keys and one of values, with the methods of Candle's own cache.
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
//! - `cuda`: CUDA devices work; turns on Candle's feature `cuda`, which needs `nvcc`.
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
pub mod kv_cache;
#[cfg(feature = "cuda")]
mod lease;
pub mod mapping;
pub mod physical_memory;
pub mod relief;
mod tensor_pool;
pub mod virtual_memory;

pub use cuda_ffi::AccessFlags;
pub use elastic_blocks::ElasticBlocks;
pub use elastic_tensor::ElasticTensor;
pub use error::{Result, VmmError};
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
