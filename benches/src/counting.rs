//! How much host memory the bookkeeping takes.
//!
//! # Safety
//! Every call goes to the system's allocator unchanged; only numbers are kept beside.

use crate::drivers::{GRANULARITY, no_op_driver};
use cuda_vmm::{Result, VirtualMemoryPool};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicIsize, Ordering};

/// The system's allocator for every program of this package.
struct CountingAllocator;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// Whether allocations are counted now, and the bytes that were allocated and not freed meanwhile.
static COUNTING: AtomicBool = AtomicBool::new(false);
static HELD_BYTES: AtomicIsize = AtomicIsize::new(0);

fn count(bytes: isize) {
    if COUNTING.load(Ordering::Relaxed) {
        HELD_BYTES.fetch_add(bytes, Ordering::Relaxed);
    }
}

// SAFETY: the system's allocator keeps the contract, and every call goes to it unchanged.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count(bytes as isize - layout.size() as isize);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(pointer, layout, bytes) }
    }
}

/// What is held when an amount is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filling {
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

/// Fills a pool of 128 GiB on a driver that does nothing: no page, one, every other, which is worst
/// for the set of live bytes, and all. No other thread may allocate meanwhile.
pub fn bookkeeping_memory() -> Result<Vec<Filling>> {
    const CAPACITY: usize = 128 << 30;
    const PAGES: usize = CAPACITY / GRANULARITY;
    let device = no_op_driver(true).device(0)?;
    HELD_BYTES.store(0, Ordering::Relaxed);
    COUNTING.store(true, Ordering::Relaxed);
    let pool = VirtualMemoryPool::new(&device, CAPACITY, GRANULARITY)?;
    let fillings = [(0..0, 1), (0..1, 1), (2..PAGES, 2), (1..PAGES, 2)].map(|(pages, step)| {
        for page in pages.step_by(step) {
            pool.allocate(page * GRANULARITY, GRANULARITY)?;
        }
        Ok(Filling {
            held_bytes: HELD_BYTES.load(Ordering::Relaxed).max(0) as usize,
            mapped_bytes: pool.stats().committed_bytes,
        })
    });
    COUNTING.store(false, Ordering::Relaxed);
    fillings.into_iter().collect()
}
