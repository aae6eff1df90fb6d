//! CUDA virtual memory management that is safe, and two pools built on it.
//!
//! A program reserves far more device address space than it has memory and backs only the part that
//! is in use. The vocabulary, from the bottom up:
//!
//! - [`Driver`] and [`Device`]: the table of driver calls, and one GPU behind it. With the feature
//!   `simulator` the table can be answered by host memory, so that the same program runs, and is
//!   tested, where there is no GPU.
//! - [`Reservation`], [`PhysicalMemory`], [`Mapping`]: one noun for each thing the driver hands out.
//!   Dropping gives it back; `close` does the same and returns the error.
//! - [`Stream`], [`Fence`], [`CaptureGuard`]: whether the device has finished with memory, and what may
//!   be asked when.
//! - [`Engine`]: one budget on one device. It never holds a lock over a driver call, never unmaps what
//!   the device may still use, and loses nothing when a call fails.
//! - [`VirtualMemoryPool`], one elastic range, and [`SharedMemoryPool`], many models under one limit.
//! - [`pool::blocks`]: memory behind the block tables of paged caches.
//!
//! ```
//! # #[cfg(feature = "simulator")] {
//! use cuda_vmm::{Driver, VirtualMemoryPool};
//!
//! let device = Driver::detect()?.device(0)?;
//! let pool = VirtualMemoryPool::new(&device, 128 << 30, 2 << 20)?;
//! let address = pool.allocate(0, 1 << 30)?;
//! assert_eq!(pool.physical_memory_usage(), 1 << 30);
//! println!("1 GiB of 128 at {address:#x} on {}", device.name());
//! pool.deallocate(0, 1 << 30)?;
//! # }
//! # Ok::<(), cuda_vmm::VmmError>(())
//! ```
//!
//! # Features
//! - `bindgen` (on by default): the driver's types come from the machine's `cuda.h`, which the build then needs, with
//!   libclang. Without it they are declared by hand, the interface is the same, and the build needs nothing of CUDA.
//! - `simulator`: `Driver::simulated`, and `Driver::detect` finds a simulated driver if no GPU answers.
//! - `serde`: [`Snapshot`] and its parts can be written and read.
//!
//! # What this crate does not do
//! It launches no kernels, schedules nothing and knows no tensors; memory comes back as addresses.
//! Reading or writing through an address is the caller's, and unsafe. No unified (managed) memory.
//! Linux only: elsewhere the crate compiles and opening a driver is [`VmmError::Load`].

#![cfg_attr(docsrs, feature(doc_cfg))]
#![deny(unsafe_code)]

mod capture;
mod device;
mod driver;
mod engine;
mod error;
mod events;
mod fence;
mod foreign;
mod mapping;
mod physical;
pub mod pool;
mod process;
mod quarantine;
mod reservation;
#[cfg(unix)]
mod share;
mod size;
mod stream;
mod sync;

pub use capture::CaptureGuard;
pub use cuda_vmm_sys as sys;
pub use device::Device;
#[cfg(feature = "simulator")]
pub use driver::REQUIRE_GPU_VARIABLE;
pub use driver::{Driver, DriverKind, DriverVersion};
pub use engine::{
    CompactReport, Engine, EngineCounters, EngineOptions, EngineStats, GraphPin, LeaseToken,
    MakeRoom, MemoryParts, PoolCounters, PoolOptions, StepReport, WorkerMode,
};
pub use error::{CloseError, DriverError, Result, VmmError};
pub use fence::Fence;
pub use mapping::{Access, Mapping};
pub use physical::PhysicalMemory;
pub use pool::{
    ModelOptions, ModelQuota, ModelSnapshot, PoolStats, SharedMemoryPool, SharedPoolOptions,
    Snapshot, VirtualMemoryPool,
};
#[doc(hidden)]
pub use process::PerProcess;
pub use reservation::Reservation;
pub use stream::Stream;

#[cfg(feature = "simulator")]
pub use cuda_vmm_sim as sim;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
