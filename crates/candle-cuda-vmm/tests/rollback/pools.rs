//! Addresses, memory and mappings by hand.

use crate::bench::Bench;
use crate::common::{GIB, GRANULE};
use candle_core::Device;
use candle_cuda_vmm::cuda_vmm::VmmError as Core;
use candle_cuda_vmm::cuda_vmm::sim::Fault;
use candle_cuda_vmm::cuda_vmm::sys::{self, DriverFunction};
use candle_cuda_vmm::{
    AccessFlags, PhysicalMemoryHandle, SharedMemoryPool, VirtualAddressRange, VirtualMemoryPool,
    VmmError, map_memory, set_memory_access,
};
use std::time::{Duration, Instant};

#[test]
fn an_allocation_that_fails_leaves_nothing_behind() {
    let bench = Bench::new();
    let start = bench.books();
    let mut pool = VirtualMemoryPool::new(GIB, GRANULE, Device::Cpu).unwrap();
    pool.allocate(10 * GRANULE + 5, 3).unwrap();
    let (books, stats) = (bench.books(), pool.detailed_stats());
    let pool = std::cell::RefCell::new(pool);
    let (calls, _) = bench.fail_each_call(
        || pool.borrow_mut().allocate(8 * GRANULE - 1, 2 * GRANULE),
        |call| {
            let pool = pool.borrow();
            assert_eq!(pool.detailed_stats(), stats, "call {call}");
            assert!(!pool.is_mapped(8 * GRANULE - 1, 1));
            let now = bench.books();
            assert_eq!(now.physical_bytes, books.physical_bytes, "call {call}");
            assert_eq!(now.mapped_bytes, books.mapped_bytes, "call {call}");
            assert_eq!(now.handles, books.handles, "call {call}");
        },
    );
    assert!(
        calls >= 3,
        "an allocation creates, maps and sets access: {calls} calls"
    );
    assert_eq!(pool.borrow().physical_memory_usage(), 4 * GRANULE);
    drop(pool);
    assert_eq!(bench.books().physical_bytes, start.physical_bytes);
    assert_eq!(bench.books().reservations, start.reservations);
}

#[test]
fn an_allocation_for_a_model_that_fails_leaves_nothing_behind() {
    let bench = Bench::new();
    let mut pool = SharedMemoryPool::new(GIB, Device::Cpu).unwrap();
    pool.register_model("model", GIB).unwrap();
    let (books, stats) = (bench.books(), pool.detailed_stats());
    let pool = std::cell::RefCell::new(pool);
    let (calls, _) = bench.fail_each_call(
        || pool.borrow_mut().allocate_for_model("model", 3 * GRANULE),
        |call| {
            assert_eq!(pool.borrow().detailed_stats(), stats, "call {call}");
            assert_eq!(pool.borrow().global_stats().physical_usage, 0);
            assert_eq!(
                bench.books().physical_bytes,
                books.physical_bytes,
                "call {call}"
            );
        },
    );
    assert!(calls >= 3, "{calls} calls");
}

#[test]
fn pools_and_models_that_cannot_be_made_leave_nothing_behind() {
    let bench = Bench::new();
    let start = bench.books();
    let same = |call: usize| {
        let now = bench.books();
        assert_eq!(now.reservations, start.reservations, "call {call}");
        assert_eq!(now.physical_bytes, start.physical_bytes, "call {call}");
        assert_eq!(now.streams, start.streams, "call {call}");
        assert_eq!(now.events, start.events, "call {call}");
    };
    let (calls, pool) =
        bench.fail_each_call(|| VirtualMemoryPool::new(GIB, GRANULE, Device::Cpu), same);
    assert!(calls >= 1);
    drop(pool);
    same(0);

    let (_, pool) = bench.fail_each_call(|| SharedMemoryPool::new(GIB, Device::Cpu), same);
    let pool = std::cell::RefCell::new(pool);
    let (calls, ()) = bench.fail_each_call(
        || pool.borrow_mut().register_model("model", GIB),
        |call| {
            assert_eq!(pool.borrow().global_stats().num_models, 0);
            assert_eq!(
                bench.books().reservations,
                start.reservations,
                "call {call}"
            );
        },
    );
    assert!(calls >= 1);
    drop(pool);
    same(0);
}

#[test]
fn mapping_by_hand_that_fails_changes_nothing() {
    let bench = Bench::new();
    let start = bench.books();
    let reserve = || VirtualAddressRange::new(16 * GRANULE, GRANULE);
    let (_, range) = bench.fail_each_call(reserve, |_| assert_eq!(bench.books(), start));
    let create = || PhysicalMemoryHandle::new(GRANULE, &Device::Cpu);
    let reserved = bench.books();
    let (_, memory) = bench.fail_each_call(create, |_| assert_eq!(bench.books(), reserved));
    let created = bench.books();
    bench.fail_each_call(
        || map_memory(&range, 0, &memory, 0, GRANULE),
        |_| assert_eq!(bench.books(), created),
    );
    let mapped = bench.books();
    let access = || set_memory_access(&range, 0, GRANULE, 0, AccessFlags::ReadWrite);
    bench.fail_each_call(access, |_| assert_eq!(bench.books(), mapped));
    bench.fail_each_call(
        || candle_cuda_vmm::unmap_memory(&range, 0, GRANULE),
        |_| assert_eq!(bench.books(), mapped),
    );
    assert_eq!(bench.books(), created);
    drop((range, memory));
    assert_eq!(bench.books(), start);
}

#[test]
fn a_range_that_the_driver_will_not_take_back_is_tried_again() {
    let bench = Bench::new();
    let start = bench.books();
    for refused in [DriverFunction::cuMemUnmap, DriverFunction::cuMemAddressFree] {
        let range = VirtualAddressRange::new(16 * GRANULE, GRANULE).unwrap();
        let memory = PhysicalMemoryHandle::new(GRANULE, &Device::Cpu).unwrap();
        map_memory(&range, 0, &memory, 0, GRANULE).unwrap();
        drop(memory);
        bench
            .simulator()
            .inject(Fault::nth_of(refused, 1, sys::CUDA_ERROR_UNKNOWN));
        drop(range);
        assert_eq!(
            bench.books().reservations,
            start.reservations + 1,
            "{refused} failed, so the addresses are held"
        );
        // Making the next range retries first.
        drop(VirtualAddressRange::new(GRANULE, GRANULE).unwrap());
        assert_eq!(bench.books(), start, "{refused}");
    }
}

#[test]
fn pools_that_the_driver_will_not_take_back_are_tried_again() {
    let bench = Bench::new();
    let start = bench.books();
    for refused in [
        DriverFunction::cuMemUnmap,
        DriverFunction::cuMemRelease,
        DriverFunction::cuMemAddressFree,
    ] {
        let mut pool = VirtualMemoryPool::new(GIB, GRANULE, Device::Cpu).unwrap();
        pool.allocate(0, 4 * GRANULE).unwrap();
        bench
            .simulator()
            .inject(Fault::always(refused, sys::CUDA_ERROR_UNKNOWN));
        drop(pool);
        bench.simulator().clear_faults();
        // The owner of the rest retries: the pool's engine while its worker still runs, then the
        // device.
        let deadline = Instant::now() + Duration::from_secs(10);
        let is_back = || {
            bench.device.retry_quarantine();
            let now = bench.books();
            (now.physical_bytes, now.reservations) == (start.physical_bytes, start.reservations)
        };
        while !is_back() {
            assert!(
                Instant::now() < deadline,
                "{refused}: {:?} from {start:?}, {} in quarantine",
                bench.books(),
                bench.device.quarantined_bytes()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(bench.device.quarantined_bytes(), 0, "{refused}");
    }
}

#[test]
fn the_drivers_own_out_of_memory_is_told_from_other_failures() {
    let bench = Bench::new();
    let mut pool = VirtualMemoryPool::new(GIB, GRANULE, Device::Cpu).unwrap();
    let create = DriverFunction::cuMemCreate;
    bench
        .simulator()
        .inject(Fault::always(create, sys::CUDA_ERROR_OUT_OF_MEMORY));
    let error = pool.allocate(0, GRANULE).unwrap_err();
    bench.simulator().clear_faults();
    assert!(error.is_out_of_memory() && error.is_retryable(), "{error}");
    match error {
        VmmError::Vmm(Core::Driver(error)) => assert_eq!(error.call, create),
        VmmError::OutOfPhysicalMemory { .. } => {}
        other => panic!("{other:?}"),
    }
    pool.allocate(0, GRANULE).unwrap();
}
