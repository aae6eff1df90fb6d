//! The memory behind the addresses can be written and read, and is freed.

use crate::bytes::{expect_pattern, pattern, write};
use crate::common::{GIB, GRANULE, UnderTest, open, page};
use candle_cuda_vmm::cuda_vmm::Stream;
use candle_cuda_vmm::{SharedMemoryPool, VirtualMemoryPool};
use std::time::{Duration, Instant};

#[test]
fn tokens_that_share_pages_keep_their_own_bytes() {
    let test = open();
    let stream = Stream::new(&test.core).unwrap();
    // A little over 300 KiB if a page has 2 MiB.
    let size = 75 * page() / 512 + 7;
    let mut pool = VirtualMemoryPool::new(GIB, page(), test.device.clone()).unwrap();
    for token in 0..50 {
        let address = pool.allocate(token * size, size).unwrap();
        write(&stream, address, &pattern(token, size));
    }
    for token in (0..50).step_by(2) {
        pool.deallocate(token * size, size).unwrap();
    }
    for token in (1..50).step_by(2) {
        let address = pool.base_address() + token * size;
        expect_pattern(&stream, address, token, size);
    }
    for token in (0..50).step_by(2) {
        let address = pool.allocate(token * size, size).unwrap();
        write(&stream, address, &pattern(token + 1000, size));
    }
    for token in 0..50 {
        let address = pool.base_address() + token * size;
        let written = if token % 2 == 0 { token + 1000 } else { token };
        expect_pattern(&stream, address, written, size);
    }
}

#[test]
fn models_do_not_touch_each_other() {
    let test = open();
    let stream = Stream::new(&test.core).unwrap();
    let mut pool = SharedMemoryPool::new(GIB, test.device.clone()).unwrap();
    let mut blocks = Vec::new();
    for model in ["llama-7b", "gpt2"] {
        pool.register_model(model, 2 * GIB).unwrap();
        for block in 0..8 {
            let size = GRANULE / 3 + block;
            let address = pool.allocate_for_model(model, size).unwrap();
            write(&stream, address, &pattern(address, size));
            blocks.push((address, size));
        }
    }
    for (address, size) in blocks {
        expect_pattern(&stream, address, address, size);
    }
}

#[test]
fn freeing_under_queued_work_does_no_harm() {
    let test = open();
    let stream = Stream::new(&test.core).unwrap();
    let mut pool = VirtualMemoryPool::new(160 * page(), page(), test.device.clone()).unwrap();
    for round in 0..20 {
        let address = pool.allocate(round * 8 * page(), 8 * page()).unwrap();
        // SAFETY: the bytes are allocated when the work is queued, and freed bytes stay mapped
        // until that work has completed.
        unsafe { stream.memset(address as u64, round as u8, 8 * page()) }.unwrap();
        pool.deallocate(round * 8 * page(), 8 * page()).unwrap();
    }
    drop(pool);
    stream.synchronize().unwrap();
    test.core.synchronize().unwrap();
}

#[test]
fn compact_returns_slack_and_keeps_the_bytes() {
    let test = open();
    let stream = Stream::new(&test.core).unwrap();
    let mut pool = VirtualMemoryPool::new(256 * page(), page(), test.device.clone()).unwrap();
    let base = pool.allocate(0, 256 * page()).unwrap();
    for kept in (0..256).step_by(16) {
        write(&stream, base + kept * page(), &pattern(kept, page()));
        pool.deallocate((kept + 1) * page(), 15 * page()).unwrap();
    }
    // Freed memory may still be retiring, and then there is nothing to return yet.
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        pool.compact().unwrap();
        let stats = pool.detailed_stats();
        if stats.committed_bytes == 16 * page() {
            break;
        }
        assert!(Instant::now() < deadline, "{stats}");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(pool.detailed_stats().parts.slack_bytes, 0);
    assert_eq!(pool.physical_memory_usage(), 16 * page());
    for kept in (0..256).step_by(16) {
        expect_pattern(&stream, base + kept * page(), kept, page());
    }
}

/// Runs the work once, so that the driver has allocated what it keeps, and again to compare the
/// device's memory before and after. The worker of an engine may be in a step while the pool is
/// dropped; then its memory comes back a moment later.
fn in_use_before_and_after(test: &UnderTest, work: impl Fn()) {
    work();
    test.expect_no_leak_after(Duration::from_secs(10));
    let before = test.free_bytes();
    work();
    let until = Instant::now() + Duration::from_secs(10);
    while test.free_bytes() < before {
        assert!(Instant::now() < until, "{before} bytes were free");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(test.core.quarantined_bytes(), 0);
}

#[test]
fn dropping_an_elastic_pool_returns_every_byte() {
    let test = open();
    in_use_before_and_after(&test, || {
        let mut pool = VirtualMemoryPool::new(2048 * page(), page(), test.device.clone()).unwrap();
        let before = test.free_bytes();
        pool.allocate(5, 512 * page()).unwrap();
        pool.allocate(1024 * page(), 77 * page()).unwrap();
        assert!(before - test.free_bytes() >= (512 + 78) * page());
        pool.deallocate(100 * page(), 50 * page()).unwrap();
    });
}

#[test]
fn dropping_a_shared_pool_returns_every_byte() {
    let test = open();
    in_use_before_and_after(&test, || {
        let mut pool = SharedMemoryPool::new(4 * GIB, test.device.clone()).unwrap();
        for model in ["a", "b", "c"] {
            pool.register_model(model, 8 * GIB).unwrap();
            let address = pool.allocate_for_model(model, GIB).unwrap();
            pool.deallocate_for_model_address(model, address, GIB / 2)
                .unwrap();
        }
        pool.unregister_model("b").unwrap();
    });
}
