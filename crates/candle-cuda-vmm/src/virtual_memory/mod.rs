//! Pools that return addresses: one elastic range, and many models under one limit.
//!
//! Both wrap the pools of [`cuda_vmm`] with the names and signatures of 0.1.1. All sizes are in
//! bytes.
//!
//! # Live memory
//! *Live* bytes are allocated and not yet deallocated. A page is live while any byte in it is.
//! Every count of 0.1.1 ([`MemoryStats`], [`GlobalMemoryStats`],
//! [`VirtualMemoryPool::physical_memory_usage`], [`VirtualMemoryPool::is_mapped`]) is of live
//! memory only. The device may hold more for a while: freed memory that is still mapped for reuse,
//! or that the device may still use. `detailed_stats()` lists the parts.
//!
//! # Unaligned offsets and sizes
//! Offsets and sizes need not be multiples of the page size. Exactly the requested bytes become
//! live. Two allocations may share a page: an allocation fails with `AlreadyMapped` only if its
//! *bytes* overlap live bytes. The pages that the bytes touch are backed in full. A page is freed
//! when its last live byte is freed.
//!
//! # When freed memory is reused
//! No driver call waits for kernels, and `deallocate` does not wait either. Freed memory is reused
//! only after all work that had been launched on the device's context by then, on any stream, has
//! completed. Do not launch *further* work that uses freed bytes.
//!
//! That holds for pages. Freed bytes in a page that other live bytes keep can be allocated again at
//! once. Code that passes such bytes from one stream to another must order the two.

mod elastic;
mod pages;
mod shared;
mod stats;

pub use elastic::VirtualMemoryPool;
pub use shared::SharedMemoryPool;
pub use stats::{GlobalMemoryStats, MemoryStats};
