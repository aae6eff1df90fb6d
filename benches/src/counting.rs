//! How much host memory the bookkeeping takes.
//!
//! # Safety
//! Every call goes to the system's allocator unchanged; only numbers are kept beside.

use crate::no_op::{GRANULARITY, no_op_driver};
use cuda_vmm::{Result, VirtualMemoryPool};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicIsize, Ordering};

/// The system's allocator, which counts what is held while it is told to.
#[derive(Debug, Default)]
pub struct CountingAllocator {
    counting: AtomicBool,
    held_bytes: AtomicIsize,
}

impl CountingAllocator {
    /// One that does not count yet.
    pub const fn new() -> Self {
        Self {
            counting: AtomicBool::new(false),
            held_bytes: AtomicIsize::new(0),
        }
    }

    fn count(&self, bytes: isize) {
        if self.counting.load(Ordering::Relaxed) {
            self.held_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// Bytes that were allocated and not freed while it counted.
    fn held_bytes(&self) -> usize {
        let bytes = self.held_bytes.load(Ordering::Relaxed);
        usize::try_from(bytes).unwrap_or_default()
    }
}

// SAFETY: the system's allocator keeps the contract, and every call goes to it unchanged.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.count(layout.size() as isize);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        self.count(-(layout.size() as isize));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// What is held when an amount is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filling {
    /// Bytes of device memory that are mapped.
    pub mapped_bytes: usize,
    /// Bytes of host memory that the pool holds for its bookkeeping.
    pub held_bytes: usize,
}

impl Filling {
    /// What may be held: 64 KiB and 0.01% of the bytes mapped.
    pub fn allowed_bytes(&self) -> usize {
        (64 << 10) + self.mapped_bytes / 10_000
    }
}

/// Fills a pool of 128 GiB by pages on a driver that does nothing: nothing, one page, every other
/// page, which is the worst for the set of live bytes, and all.
///
/// The allocator must be this program's, and no other thread may allocate meanwhile.
///
/// # Errors
/// Those of the pool.
pub fn bookkeeping_memory(allocator: &CountingAllocator) -> Result<[Filling; 4]> {
    const CAPACITY: usize = 128 << 30;
    const PAGES: usize = CAPACITY / GRANULARITY;
    let device = no_op_driver().device(0)?;
    let before = allocator.held_bytes();
    allocator.counting.store(true, Ordering::Relaxed);
    let pool = VirtualMemoryPool::new(&device, CAPACITY, GRANULARITY)?;
    let now = || Filling {
        held_bytes: allocator.held_bytes() - before,
        mapped_bytes: pool.stats().committed_bytes,
    };
    let fill = |pages: &mut dyn Iterator<Item = usize>| -> Result<Filling> {
        for page in pages {
            pool.allocate(page * GRANULARITY, GRANULARITY)?;
        }
        Ok(now())
    };
    let fillings = [
        now(),
        fill(&mut core::iter::once(0))?,
        fill(&mut (2..PAGES).step_by(2))?,
        fill(&mut (1..PAGES).step_by(2))?,
    ];
    allocator.counting.store(false, Ordering::Relaxed);
    Ok(fillings)
}
