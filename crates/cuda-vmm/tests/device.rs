//! Cases that run unchanged on a real GPU and on the simulated driver, over whole pools.
//!
//! The environment chooses the driver, the devices and the page (`common/under_test.rs`). The cases
//! take turns, because each ends by looking at what the process and the device hold.

mod common;

#[path = "device/compact.rs"]
mod compact;
#[path = "device/graph.rs"]
mod graph;
#[path = "device/handover.rs"]
mod handover;
#[path = "device/pools.rs"]
mod pools;
#[path = "device/rules.rs"]
mod rules;
#[path = "device/running_work.rs"]
mod running_work;
#[path = "device/sleep.rs"]
mod sleep;
#[path = "device/streams.rs"]
mod streams;

use common::{Gate, manual, under_test};
use cuda_vmm::{Device, Engine, Stream, VirtualMemoryPool};
use std::sync::Once;

/// The page of the pools, in bytes.
fn page() -> usize {
    under_test().page_bytes
}

/// Has the driver take what it takes for itself at the first use of a call.
fn warm(device: &Device) {
    let page = page();
    let stream = Stream::new(device).expect("a stream");
    let pool = VirtualMemoryPool::new(device, 2 * page, page).expect("a pool");
    let address = pool.allocate(0, 2 * page).expect("room");
    let middle = address + page as u64;
    // SAFETY: the addresses are live until the pool is closed, after the work is waited for.
    unsafe {
        stream.memset(address, 1, page).expect("set");
        stream.copy(middle, address, page).expect("copied");
        stream.write(address, &[2; 64]).expect("written");
        stream.read(middle, &mut [0; 64]).expect("read");
    }
    Gate::close(device, stream.raw()).open();
    let per_thread = core::ptr::without_provenance_mut(2);
    Gate::close(device, per_thread).open();
    stream.record().expect("a fence").wait().expect("done");
    device.synchronize().expect("done");
    pool.deallocate(0, 2 * page).expect("live");
    pool.close().expect("closed");
}

/// Runs a case alone, and fails unless all is given back afterwards.
#[track_caller]
fn case(test: impl FnOnce(&Device)) {
    static WARM: Once = Once::new();
    let under_test = under_test();
    let _turn = common::turn();
    let device = under_test.device();
    WARM.call_once(|| warm(device));
    under_test.unchanged_here(|| test(device));
}

/// Sets every byte of a range and waits.
fn fill(stream: &Stream, address: u64, bytes: usize, value: u8) {
    // SAFETY: callers pass memory that is mapped until the wait is over.
    unsafe { stream.memset(address, value, bytes) }.expect("queued");
    stream.synchronize().expect("done");
}

/// The first and the last byte of a range.
fn ends(stream: &Stream, address: u64, bytes: usize) -> [u8; 2] {
    [address, address + bytes as u64 - 1].map(|address| {
        let mut byte = [0];
        // SAFETY: callers pass memory that is mapped.
        unsafe { stream.read(address, &mut byte) }.expect("read");
        byte[0]
    })
}

/// A pool whose engine does nothing by itself.
fn pool(device: &Device, pages: usize) -> (Engine, VirtualMemoryPool) {
    let engine = Engine::new(device, manual()).expect("an engine");
    let pool = VirtualMemoryPool::on_engine(&engine, pages * page(), page()).expect("a pool");
    (engine, pool)
}
