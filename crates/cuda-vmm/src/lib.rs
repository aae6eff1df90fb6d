//! CUDA virtual memory management that is safe, and two pools built on it.
//!
//! A program reserves far more device address space than it has memory and backs only the part that
//! is in use. From the bottom up; the [glossary](#glossary) has the words:
//!
//! - [`Driver`] and [`Device`]: the table of driver calls, and one GPU behind it. With the feature
//!   `simulator` a simulated driver over host memory fills the table, so the same program runs, and
//!   is tested, on a machine without a GPU.
//! - [`Reservation`], [`PhysicalMemory`], [`Mapping`]: one noun for each thing the driver hands
//!   out. Dropping gives it back; `close` does the same and returns the error.
//! - [`Stream`], [`Fence`], [`CaptureGuard`]: whether the device has finished with memory, and
//!   which calls may be made during a capture.
//! - [`Graph`]: work of a stream that is captured once and launched many times.
//! - [`Engine`]: one budget on one device. It never holds a lock over a driver call, never unmaps
//!   what the device may still use, and loses nothing when a call fails.
//! - [`VirtualMemoryPool`], one elastic range, and [`SharedMemoryPool`], many models under one
//!   limit.
//! - [`pool::blocks`]: memory behind the block tables of paged caches.
//! - [`HostStore`]: pinned host memory, under a limit of its own.
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
//! # Glossary
//!
//! Addresses and memory:
//!
//! - *reservation*: device addresses without memory; they cost no memory.
//! - *page*: the unit in which addresses get memory, a power of two bytes; 2 MiB as a rule.
//! - *chunk*: one piece of physical memory behind one mapping, of one page or several.
//! - *range*: the addresses of one pool, or of one model; it grows and shrinks in place.
//! - *extent*: a run of live bytes without a gap.
//! - *piece*: pinned host memory that a host store makes, keeps and gives back whole.
//! - *block*: a numbered part of a paged cache, with bytes in each of its tensors.
//!
//! What memory is. Each committed byte is in exactly one of the parts marked with †:
//!
//! - *committed*: held from the driver; the sum of the parts.
//! - *live*†: in a page with a byte that is allocated and not freed.
//! - *leased*†: freed, and kept by a lease.
//! - *shared*†: in a chunk that several ranges of an account map; counted once, and of no range.
//! - *slack*†: in a page without live bytes, in a chunk with live pages.
//! - *filling*†: being made and mapped and its access set, or new memory of a compaction.
//! - *retiring*†: freed, but the device may still use it, or it is being unmapped.
//! - *parked*†: freed, and the device has finished with it; still mapped, for the next allocation.
//! - *ahead*†: made and mapped before it is asked for, behind the latest allocation or where the
//!   owner says that the next will be; given up first.
//! - *cached*†: unmapped and overwritten with zeros, on no account; any range may take it.
//! - *quarantined*†: refused by the driver when it was unmapped, released or moved; retried.
//! - *asleep*: given up by a range that sleeps, and had again when it wakes; not committed.
//! - *pinned*: kept mapped for a captured graph, though it is freed.
//!
//! Budgets:
//!
//! - *account*: a share of a budget, to which any number of ranges is charged. A model is one with
//!   a name; a range that is made alone has one of its own. A closed account gets no memory any
//!   more.
//! - *guarantee*: memory that an account can always have, whatever others hold.
//! - *ceiling*: the most that an account may hold.
//! - *limit*: the most that all accounts of a budget may hold.
//! - *headroom*: memory of the device that a budget leaves to other allocators.
//! - *pressure*: accounts want more memory than there is, so others are asked for some.
//! - *owed*: the bytes that an account is asked to free for others, or so that it comes below its
//!   ceiling or all come below the limit.
//! - *withdraw*: no longer want what was refused, so that others do not owe it.
//!
//! Calls:
//!
//! - *fence*: a point in the work of a stream or a context; once it is past, that work is done.
//! - *capture*: recording a stream's work into a graph; some driver calls would end it.
//! - *lease*: live bytes that stay mapped after they are freed, until a token says that they are no
//!   longer in use. An allocation of leased bytes asks the tokens once and does not wait.
//! - *token*: what a lease asks; a Candle tensor's storage is one.
//! - *step*: one round of an engine's work in the background, by its worker or by a caller.
//! - *trim*: give back all that is parked, cached or ahead, except what is pinned.
//! - *relieve*: give memory that is spare back to the driver, for another allocator.
//! - *compact*: move live pages to chunks that fit, at unchanged addresses, so slack goes back.
//! - *sleep*: give up all memory of a range, and keep its addresses and what was live.
//! - *wake*: have that memory again at the same addresses, with the contents if they were kept.
//! - *share*: map chunks of one range behind another one's addresses too, without a copy.
//! - *make private*: give a range memory of its own in the place of what it shares.
//! - *reclaim*: choose blocks to evict or move so that whole pages of a paged cache empty.
//!
//! # Features
//! - `bindgen` (on by default): the driver's types come from the machine's `cuda.h`, which the
//!   build then needs, with libclang. Without it they are declared by hand, the interface is the
//!   same, and the build needs nothing of CUDA.
//! - `simulator`: `Driver::simulated`, and `Driver::detect` finds a simulated driver if no GPU
//!   responds.
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
mod graph;
mod host_store;
mod mapping;
mod memory_parts;
mod physical;
pub mod pool;
mod process;
mod quarantine;
mod reservation;
#[cfg(unix)]
mod share;
mod size;
mod stream;
mod stream_handle;
mod sync;

pub use capture::CaptureGuard;
pub use cuda_vmm_sys as sys;
pub use device::{Device, MakeRoom};
pub use driver::{Driver, DriverKind, DriverVersion};
pub use engine::{
    Account, AccountStats, CompactReport, Demand, Engine, EngineCounters, EngineOptions,
    EngineStats, Givable, GraphPin, Keep, LeaseToken, PoolCounters, PoolOptions, Quota, Slept,
    StepReport, WorkerMode,
};
#[cfg(feature = "simulator")]
pub use error::REQUIRE_GPU_VARIABLE;
pub use error::{CloseError, DriverError, QuotaConflict, Result, VmmError};
pub use fence::Fence;
pub use graph::{Graph, GraphMemory, GraphNodes};
pub use host_store::{HostBytes, HostStore, HostStoreOptions, HostStoreStats};
pub use mapping::{Access, Mapping};
pub use memory_parts::MemoryParts;
pub use physical::PhysicalMemory;
pub use pool::{
    AccountSnapshot, Arriving, Backed, PoolStats, Shared, SharedMemoryPool, SharedPart,
    SharedPoolOptions, Snapshot, VirtualMemoryPool, WakeOptions,
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
