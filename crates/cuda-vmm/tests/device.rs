//! Cases that run unchanged on a real GPU and on the simulated driver.
//!
//! `CUDA_VMM_TEST_DRIVER=real|simulated` chooses; where it is unset, `Driver::detect()` does. Where the
//! real driver is demanded and there is no GPU, every case fails. The cases take turns, because some of
//! them look at the memory that the device has left.

mod common;

#[path = "device/pools.rs"]
mod pools;
#[path = "device/rules.rs"]
mod rules;
#[path = "device/running_work.rs"]
mod running_work;

use common::{Gate, manual};
use cuda_vmm::{Device, Engine, Stream, VirtualMemoryPool};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// The device, open for as long as the process lives, and warm: what the driver takes for itself at the
/// first use of a call is taken.
fn device() -> Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE
        .get_or_init(|| {
            let device = common::driver().device(0).expect("the first device");
            let page = device.granularity_bytes();
            let stream = Stream::new(&device).expect("a stream");
            let pool = VirtualMemoryPool::new(&device, 2 * page, page).expect("a pool");
            let address = pool.allocate(0, 2 * page).expect("room");
            let middle = address + page as u64;
            // SAFETY: the addresses are live until the pool is closed, after the work is waited for.
            unsafe {
                stream.memset(address, 1, page).expect("set");
                stream.copy(middle, address, page).expect("copied");
                stream.write(address, &[2; 64]).expect("written");
                stream.read(middle, &mut [0; 64]).expect("read");
            }
            Gate::close(&device, stream.raw()).open();
            let per_thread = core::ptr::without_provenance_mut(2);
            Gate::close(&device, per_thread).open();
            stream.record().expect("a fence").wait().expect("done");
            device.synchronize().expect("done");
            pool.deallocate(0, 2 * page).expect("live");
            pool.close().expect("closed");
            device
        })
        .clone()
}

fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a case alone, and fails unless the device has as much free memory afterwards as before.
#[track_caller]
fn case(test: impl FnOnce(&Device)) {
    let _turn = turn();
    let device = device();
    let before = device.free_bytes().expect("a number");
    test(&device);
    // What the driver gives back it may give back a moment later.
    let until = Instant::now() + Duration::from_secs(1);
    loop {
        let after = device.free_bytes().expect("a number");
        if after == before {
            break;
        }
        assert!(
            Instant::now() < until,
            "{before} bytes were free before, {after} after"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(device.quarantined_bytes(), 0);
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
    let page = device.granularity_bytes();
    let engine = Engine::new(device, manual()).expect("an engine");
    let pool = VirtualMemoryPool::on_engine(&engine, pages * page, page).expect("a pool");
    (engine, pool)
}
