//! How much host memory the bookkeeping takes: at most 64 KiB and 0.01% of the bytes mapped.

use cuda_vmm::VirtualMemoryPool;
use cuda_vmm_benches::{GRANULARITY, no_op_driver};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged; only numbers are kept beside.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn bookkeeping_stays_below_64_kib_and_a_ten_thousandth_of_the_bytes_mapped() {
    const CAPACITY: usize = 128 << 30;
    let device = no_op_driver().device(0).expect("device");
    let before = HELD.load(Ordering::Relaxed);
    let pool = VirtualMemoryPool::new(&device, CAPACITY, GRANULARITY).expect("pool");
    let mut report = Vec::with_capacity(8);
    // Nothing, one page, every other page (the worst for the set of live bytes), and all of it.
    let held = || HELD.load(Ordering::Relaxed) - before;
    report.push((0, held()));
    pool.allocate(0, GRANULARITY).expect("room");
    report.push((pool.stats().committed_bytes, held()));
    for page in (2..CAPACITY / GRANULARITY).step_by(2) {
        pool.allocate(page * GRANULARITY, GRANULARITY)
            .expect("room");
    }
    report.push((pool.stats().committed_bytes, held()));
    for page in (1..CAPACITY / GRANULARITY).step_by(2) {
        pool.allocate(page * GRANULARITY, GRANULARITY)
            .expect("room");
    }
    report.push((pool.stats().committed_bytes, held()));
    for (mapped, held) in &report {
        println!("{mapped} bytes mapped: {held} bytes of bookkeeping");
    }
    for (mapped, held) in report {
        let most = (64 << 10) + mapped / 10_000;
        assert!(
            held <= most,
            "{held} bytes for {mapped} mapped, at most {most}"
        );
    }
}
