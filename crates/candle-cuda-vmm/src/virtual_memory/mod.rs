//! The pools: one elastic range, and many models under one limit.
//!
//! Both are those of [`cuda_vmm`] behind the names and signatures of 0.1.1. They count in bytes.
//!
//! # Live memory
//! *Live* bytes are those allocated and not yet deallocated. A page is live while any byte in it is.
//! Every count that 0.1.1 had ([`MemoryStats`], [`GlobalMemoryStats`],
//! [`VirtualMemoryPool::physical_memory_usage`], [`VirtualMemoryPool::is_mapped`]) speaks of live memory
//! alone. The device may hold more than that for a while: memory freed but still mapped for the next
//! request, or waiting until the device has finished with it. `detailed_stats()` has the parts.
//!
//! # Unaligned edges
//! Offsets and sizes need not be multiples of the page. Exactly the bytes asked for become live, so
//! neighbours may share a page: an allocation fails with `AlreadyMapped` only if its *bytes* overlap live
//! ones. The pages that the bytes touch are backed in full, and a page is given back when its last live
//! byte is freed.
//!
//! # When freed memory comes back
//! Nothing in the driver waits for kernels. `deallocate` never waits either: the memory is handed on
//! only when all work that had been launched on the device's context by then is done. That holds for
//! work on any stream. Do not launch *further* work that uses freed bytes.
//!
//! That is about pages. Bytes that are freed in a page which a neighbour keeps live can be allocated again at
//! once; who hands them from one stream to another orders the two.

mod elastic;
mod shared;
mod stats;

pub use elastic::VirtualMemoryPool;
pub use shared::SharedMemoryPool;
pub use stats::{GlobalMemoryStats, MemoryStats};

/// A capacity rounded up to whole pages; as it is where that cannot be done, for the core to refuse.
fn whole_pages(capacity: usize, page: usize) -> usize {
    capacity.checked_next_multiple_of(page).unwrap_or(capacity)
}
