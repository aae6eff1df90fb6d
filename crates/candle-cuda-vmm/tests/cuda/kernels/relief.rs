//! Trims the memory pool that Candle allocates from. Simulated devices have none.

use crate::common::{GIB, open};
use crate::relief::{LEFT, candle, greedy, take};
use candle_core::CudaDevice;
use candle_core::cuda::cudarc::driver::result::{device, mem_pool};
use candle_core::cuda::cudarc::driver::sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
use candle_cuda_vmm::cuda_vmm::sys::CUDA_ERROR_OUT_OF_MEMORY;
use candle_cuda_vmm::{let_candle_make_room, trim_candle_memory};
use std::sync::{Arc, Mutex};

/// Sets how many freed bytes the device's pool keeps. Frameworks do so to allocate faster; the
/// default is 0.
fn keep(candle: &CudaDevice, bytes: u64) {
    let mut bytes = bytes;
    // SAFETY: the device is Candle's, the pool is its current one, and the value has the
    // attribute's type.
    unsafe {
        let pool = device::get_mem_pool(candle.cuda_stream().context().cu_device()).unwrap();
        let value = core::ptr::from_mut(&mut bytes).cast();
        mem_pool::set_attribute(pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, value).unwrap();
    }
}

#[test]
fn a_pool_gets_what_candle_has_freed_and_keeps() {
    let test = open();
    let candle = candle(&test);
    let free_bytes = test.free_bytes();
    keep(&candle, u64::MAX);
    drop(take(&candle, free_bytes - 2 * LEFT).unwrap());
    test.device.synchronize().unwrap();
    assert!(test.free_bytes() < 3 * LEFT, "Candle's pool keeps it");
    // Drivers such as 580 take the memory back without help.
    let_candle_make_room(&test.device).unwrap();
    let (pool, range) = greedy(&test, 8 * GIB);
    range.allocate(0, 8 * GIB).unwrap();
    test.core.set_make_room(None);
    drop((range, pool));
    keep(&candle, 0);
    trim_candle_memory(&test.device).unwrap();
    test.expect_in_use(free_bytes, 0);
}

#[test]
fn a_pool_that_runs_out_has_the_framework_give_up_what_it_holds() {
    let test = open();
    let candle = candle(&test);
    let free_bytes = test.free_bytes();
    let held = Mutex::new(Some(take(&candle, free_bytes - 2 * LEFT).unwrap()));
    let (pool, range) = greedy(&test, 8 * GIB);
    let error = range.allocate(0, 8 * GIB).unwrap_err();
    assert_eq!(error.driver_code(), Some(CUDA_ERROR_OUT_OF_MEMORY));
    let device = test.device.clone();
    test.core.set_make_room(Some(Arc::new(move |_bytes| {
        drop(held.lock().unwrap().take());
        trim_candle_memory(&device).unwrap();
    })));
    range.allocate(0, 8 * GIB).unwrap();
    test.core.set_make_room(None);
    drop((range, pool));
    test.expect_in_use(free_bytes, 0);
}

#[test]
fn trimming_gives_back_what_was_freed_and_not_waited_for_and_leaves_what_is_in_use() {
    let test = open();
    let candle = candle(&test);
    let free_bytes = test.free_bytes();
    keep(&candle, u64::MAX);
    let used = candle.clone_htod(&[7u8; 1000]).unwrap();
    drop(take(&candle, 4 * GIB).unwrap());
    assert!(test.free_bytes() <= free_bytes - 4 * GIB);
    trim_candle_memory(&test.device).unwrap();
    test.expect_in_use(free_bytes, 0);
    assert_eq!(candle.clone_dtoh(&used).unwrap(), [7u8; 1000]);
    drop(used);
    keep(&candle, 0);
    trim_candle_memory(&test.device).unwrap();
}
