//! The memory behind the addresses: it can be written and read, and it goes back.

use crate::common::{GIB, KIB, PAGE, UnderTest, open};
use candle_cuda_vmm::cuda_vmm::Stream;
use candle_cuda_vmm::{SharedMemoryPool, VirtualMemoryPool};
use std::time::{Duration, Instant};

fn write(stream: &Stream, address: usize, bytes: &[u8]) {
    // SAFETY: the tests write to bytes that they have allocated, and free them only afterwards.
    unsafe { stream.write(address as u64, bytes) }.unwrap();
}

fn read(stream: &Stream, address: usize, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    // SAFETY: the tests read bytes that they have allocated, and free them only afterwards.
    unsafe { stream.read(address as u64, &mut bytes) }.unwrap();
    bytes
}

/// Bytes that differ from token to token.
fn pattern(token: usize, size: usize) -> Vec<u8> {
    (0..size)
        .map(|byte| (byte.wrapping_mul(31) ^ token.wrapping_mul(97)) as u8)
        .collect()
}

#[test]
fn tokens_that_share_pages_keep_their_own_bytes() {
    let test = open();
    let stream = Stream::new(&test.core).unwrap();
    const TOKEN: usize = 300 * KIB + 7;
    let mut pool = VirtualMemoryPool::new(GIB, PAGE, test.device.clone()).unwrap();
    for token in 0..50 {
        let address = pool.allocate(token * TOKEN, TOKEN).unwrap();
        write(&stream, address, &pattern(token, TOKEN));
    }
    for token in (0..50).step_by(2) {
        pool.deallocate(token * TOKEN, TOKEN).unwrap();
    }
    for token in (1..50).step_by(2) {
        let address = pool.base_address() + token * TOKEN;
        assert_eq!(
            read(&stream, address, TOKEN),
            pattern(token, TOKEN),
            "token {token}"
        );
    }
    for token in (0..50).step_by(2) {
        let address = pool.allocate(token * TOKEN, TOKEN).unwrap();
        write(&stream, address, &pattern(token + 1000, TOKEN));
    }
    for token in 0..50 {
        let address = pool.base_address() + token * TOKEN;
        let written = if token % 2 == 0 { token + 1000 } else { token };
        assert_eq!(
            read(&stream, address, TOKEN),
            pattern(written, TOKEN),
            "token {token}"
        );
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
            let size = PAGE / 3 + block;
            let address = pool.allocate_for_model(model, size).unwrap();
            write(&stream, address, &pattern(address, size));
            blocks.push((address, size));
        }
    }
    for (address, size) in blocks {
        assert_eq!(read(&stream, address, size), pattern(address, size));
    }
}

#[test]
fn freeing_under_queued_work_does_no_harm() {
    let test = open();
    let stream = Stream::new(&test.core).unwrap();
    let mut pool = VirtualMemoryPool::new(GIB, PAGE, test.device.clone()).unwrap();
    for round in 0..20 {
        let address = pool.allocate(round * 8 * PAGE, 8 * PAGE).unwrap();
        // SAFETY: the bytes are allocated when the work is queued, and what is freed stays mapped until
        // that work is done.
        unsafe { stream.memset(address as u64, round as u8, 8 * PAGE) }.unwrap();
        pool.deallocate(round * 8 * PAGE, 8 * PAGE).unwrap();
    }
    drop(pool);
    stream.synchronize().unwrap();
    test.core.synchronize().unwrap();
}

#[test]
fn compact_returns_slack_and_keeps_the_bytes() {
    let test = open();
    let stream = Stream::new(&test.core).unwrap();
    let mut pool = VirtualMemoryPool::new(GIB, PAGE, test.device.clone()).unwrap();
    let base = pool.allocate(0, 256 * PAGE).unwrap();
    for page in (0..256).step_by(16) {
        write(&stream, base + page * PAGE, &pattern(page, PAGE));
        pool.deallocate((page + 1) * PAGE, 15 * PAGE).unwrap();
    }
    // What was freed may be retiring for a moment, and then there is nothing yet to give back.
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        pool.compact().unwrap();
        let stats = pool.detailed_stats();
        if stats.committed_bytes == 16 * PAGE {
            break;
        }
        assert!(Instant::now() < deadline, "{stats}");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(pool.detailed_stats().slack_bytes, 0);
    assert_eq!(pool.physical_memory_usage(), 16 * PAGE);
    for page in (0..256).step_by(16) {
        assert_eq!(
            read(&stream, base + page * PAGE, PAGE),
            pattern(page, PAGE),
            "page {page}"
        );
    }
}

/// Does the work once, so that the driver has what it keeps for itself, and once more to look at the
/// device's memory before and after.
fn in_use_before_and_after(test: &UnderTest, work: impl Fn()) {
    work();
    let before = test.free_bytes();
    work();
    assert_eq!(test.free_bytes(), before);
    assert_eq!(test.core.quarantined_bytes(), 0);
}

#[test]
fn dropping_an_elastic_pool_returns_every_byte() {
    let test = open();
    in_use_before_and_after(&test, || {
        let mut pool = VirtualMemoryPool::new(4 * GIB, PAGE, test.device.clone()).unwrap();
        let before = test.free_bytes();
        pool.allocate(5, GIB).unwrap();
        pool.allocate(2 * GIB, 77 * PAGE).unwrap();
        assert!(before - test.free_bytes() >= GIB + 78 * PAGE);
        pool.deallocate(100 * PAGE, 50 * PAGE).unwrap();
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
