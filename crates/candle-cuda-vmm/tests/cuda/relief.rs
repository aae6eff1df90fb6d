//! Candle allocates beside a pool, on a device without enough memory for both.

use crate::common::{GIB, MIB, UnderTest, open};
use candle_core::CudaDevice;
use candle_core::cuda::cudarc::driver::CudaSlice;
use candle_cuda_vmm::cuda_vmm::sys::{CUDA_ERROR_OUT_OF_MEMORY, DriverFunction};
use candle_cuda_vmm::cuda_vmm::{
    EngineOptions, PoolOptions, Quota, SharedMemoryPool, SharedPoolOptions, VirtualMemoryPool,
};
use candle_cuda_vmm::let_candle_make_room;

/// The bytes that stay free when nearly all memory is allocated. A driver needs some for its own
/// tables.
pub const LEFT: usize = GIB;

pub fn candle(test: &UnderTest) -> CudaDevice {
    test.device.as_cuda_device().unwrap().clone()
}

/// Allocates bytes from Candle.
pub fn take(candle: &CudaDevice, bytes: usize) -> candle_core::Result<CudaSlice<u8>> {
    // SAFETY: nothing reads them.
    unsafe { candle.alloc::<u8>(bytes) }
}

/// Makes a pool whose limit exceeds the device's memory and which keeps freed memory, and a model's
/// range of this many bytes of addresses in it.
pub fn greedy(test: &UnderTest, capacity_bytes: usize) -> (SharedMemoryPool, VirtualMemoryPool) {
    let options = SharedPoolOptions::new().engine(
        EngineOptions::new()
            .limit_bytes(usize::MAX / 2)
            .park_bytes_max(usize::MAX / 2),
    );
    let pool = SharedMemoryPool::with_options(&test.core, options).unwrap();
    let model = pool.register_model("model", Quota::new()).unwrap();
    let (page_bytes, options) = (pool.page_bytes(), PoolOptions::new());
    let range = VirtualMemoryPool::on_account(&model, capacity_bytes, page_bytes, options);
    (pool, range.unwrap())
}

/// Waits until all freed memory is parked.
fn settle(pool: &SharedMemoryPool) {
    while pool.stats().parts.retiring_bytes > 0 {
        pool.engine().step();
        std::thread::yield_now();
    }
}

#[test]
fn candle_that_runs_out_is_relieved_with_what_a_pool_keeps() {
    let test = open();
    let candle = candle(&test);
    let most_bytes = (test.free_bytes() - LEFT) / MIB * MIB;
    let (pool, range) = greedy(&test, most_bytes);
    range.allocate(0, most_bytes).unwrap();
    range.deallocate(0, most_bytes).unwrap();
    settle(&pool);
    let wanted_bytes = 4 * GIB;
    let refused = take(&candle, wanted_bytes).unwrap_err();
    assert!(
        refused.to_string().contains("CUDA_ERROR_OUT_OF_MEMORY"),
        "{refused}"
    );
    let given_bytes = pool.relieve(wanted_bytes);
    assert!(given_bytes >= wanted_bytes, "{given_bytes}");
    let parked_bytes = pool.stats().parts.parked_bytes;
    assert!(parked_bytes > 0, "not more than was asked for");
    let taken = take(&candle, wanted_bytes).unwrap();
    drop(taken);
    test.device.synchronize().unwrap();
}

#[test]
fn a_pool_that_runs_out_has_candle_asked_and_then_the_drivers_own_error() {
    let test = open();
    let_candle_make_room(&test.device).unwrap();
    let capacity_bytes = test.core.total_bytes() * 2;
    let (pool, range) = greedy(&test, capacity_bytes);
    let outcome = range.allocate(0, capacity_bytes);
    let error = outcome.unwrap_err();
    assert_eq!(error.driver_code(), Some(CUDA_ERROR_OUT_OF_MEMORY));
    assert!(
        error
            .to_string()
            .contains(&DriverFunction::cuMemCreate.to_string()),
        "{error}"
    );
    assert_eq!(pool.stats().committed_bytes, 0);
    // The callback keeps a clone of Candle's device, and later tests would call it.
    test.core.set_make_room(None);
    range.allocate(0, 2 * MIB).unwrap();
}
