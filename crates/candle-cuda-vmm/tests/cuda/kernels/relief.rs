//! Trims the memory pool that Candle allocates from. Simulated devices have none.

use crate::common::{GIB, open};
use crate::relief::{LEFT, candle, greedy, take};
use candle_cuda_vmm::cuda_vmm::sys::CUDA_ERROR_OUT_OF_MEMORY;
use candle_cuda_vmm::{keep_candle_memory, let_candle_make_room, trim_candle_memory};
use std::sync::{Arc, Mutex};

#[test]
fn a_pool_gets_what_candle_has_freed_and_keeps() {
    let test = open();
    let candle = candle(&test);
    let free_bytes = test.free_bytes();
    keep_candle_memory(&test.device, u64::MAX).unwrap();
    drop(take(&candle, free_bytes - 2 * LEFT).unwrap());
    test.device.synchronize().unwrap();
    assert!(test.free_bytes() < 3 * LEFT, "Candle's pool keeps it");
    // Drivers such as 580 take the memory back without help.
    let_candle_make_room(&test.device).unwrap();
    let (pool, range) = greedy(&test, 8 * GIB);
    range.allocate(0, 8 * GIB).unwrap();
    test.core.set_make_room(None);
    drop((range, pool));
    keep_candle_memory(&test.device, 0).unwrap();
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
    keep_candle_memory(&test.device, u64::MAX).unwrap();
    let used = candle.clone_htod(&[7u8; 1000]).unwrap();
    drop(take(&candle, 4 * GIB).unwrap());
    assert!(test.free_bytes() <= free_bytes - 4 * GIB);
    trim_candle_memory(&test.device).unwrap();
    test.expect_in_use(free_bytes, 0);
    assert_eq!(candle.clone_dtoh(&used).unwrap(), [7u8; 1000]);
    drop(used);
    keep_candle_memory(&test.device, 0).unwrap();
    trim_candle_memory(&test.device).unwrap();
}
