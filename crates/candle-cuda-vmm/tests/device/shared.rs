//! The shared pool.

use crate::common::{GIB, GRANULE, KIB, MIB, open, page};
use crate::refused;
use candle_core::Device;
use candle_cuda_vmm::cuda_vmm::VmmError as Core;
use candle_cuda_vmm::{
    Quota, SharedMemoryPool, TensorPoolOptions, VirtualMemoryPool, VmmError, keep_candle_memory,
    let_candle_make_room, trim_candle_memory,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Wake;
use std::time::Duration;

const LIMIT: usize = 64 * MIB;
const CAPACITY: usize = 128 * MIB;

/// Makes a pool of 64 MiB with one model, `model`, of 128 MiB of addresses.
fn pool(device: &Device) -> SharedMemoryPool {
    let mut pool = SharedMemoryPool::new(LIMIT, device.clone()).unwrap();
    pool.register_model("model", CAPACITY).unwrap();
    pool
}

/// The numbers that a refused call must not change.
fn state(pool: &SharedMemoryPool) -> (usize, usize, usize, usize) {
    let global = pool.global_stats();
    let model = pool.get_model_stats("model").unwrap();
    assert_eq!(model.physical_usage, model.mapped_pages * GRANULE);
    (
        global.physical_usage,
        global.num_models,
        model.physical_usage,
        pool.model("model").unwrap().stats().live_bytes,
    )
}

#[test]
fn a_new_pool_has_its_limit_and_nothing_else() {
    let test = open();
    let pool = SharedMemoryPool::new(32 * GIB, test.device.clone()).unwrap();
    let stats = pool.global_stats();
    assert_eq!(
        (stats.physical_limit, stats.physical_usage, stats.num_models),
        (32 * GIB, 0, 0)
    );
}

#[test]
fn a_model_allocates_many_times_and_is_told_where() {
    let test = open();
    let mut pool = pool(&test.device);
    let base = pool.model_base_address("model").unwrap();
    let mut blocks = Vec::new();
    for block in 0..64 {
        let size = 100 * KIB + block;
        let address = pool.allocate_for_model("model", size).unwrap();
        assert!(address >= base && address + size <= base + CAPACITY);
        assert_eq!(address % 256, 0);
        for &(other, length) in &blocks {
            assert!(
                address + size <= other || other + length <= address,
                "blocks overlap"
            );
        }
        blocks.push((address, size));
    }
    let total: usize = blocks.iter().map(|(_, size)| size).sum();
    assert_eq!(state(&pool).3, total);
    // By offset and by address alike.
    for (index, &(address, size)) in blocks.iter().enumerate() {
        if index % 2 == 0 {
            pool.deallocate_for_model("model", address - base, size)
                .unwrap();
        } else {
            pool.deallocate_for_model_address("model", address, size)
                .unwrap();
        }
    }
    assert_eq!(state(&pool), (0, 1, 0, 0));
}

#[test]
fn the_limit_holds_and_what_is_freed_can_be_had_again() {
    let test = open();
    let mut pool = pool(&test.device);
    let first = pool.allocate_for_model("model", LIMIT / 2).unwrap();
    pool.allocate_for_model("model", LIMIT / 2).unwrap();
    let before = state(&pool);
    const HALF: usize = LIMIT / 2;
    refused!(
        pool.allocate_for_model("model", HALF),
        VmmError::OutOfPhysicalMemory {
            requested: HALF,
            available: 0
        }
    );
    let error = pool.allocate_for_model("model", HALF).unwrap_err();
    assert!(error.is_out_of_memory() && error.is_retryable() && !error.is_permanent());
    assert_eq!(error.shortfall_bytes(), HALF);
    assert_eq!(state(&pool), before);
    pool.deallocate_for_model_address("model", first, HALF)
        .unwrap();
    pool.allocate_for_model("model", HALF).unwrap();
    assert_eq!(state(&pool), before);
}

#[test]
fn a_limit_may_exceed_the_device_and_is_reported_as_given() {
    let test = open();
    // In large chunks, so that few single pages are left, each of which takes its own driver calls.
    let taken = (test.free_bytes() - 2 * GIB) / GIB * GIB;
    let mut most = VirtualMemoryPool::new(taken, page(), test.device.clone()).unwrap();
    most.allocate(0, taken).unwrap();

    let limit = 3 * test.core.total_bytes() + 12345;
    let mut pool = SharedMemoryPool::new(limit, test.device.clone()).unwrap();
    pool.register_model("model", limit).unwrap();
    assert_eq!(pool.global_stats().physical_limit, limit);
    let free = test.free_bytes();
    let error = pool
        .allocate_for_model("model", 2 * test.core.total_bytes())
        .unwrap_err();
    assert!(error.is_out_of_memory(), "{error}");
    assert_eq!(state(&pool), (0, 1, 0, 0));
    // A driver that is asked for more than it has lets go of memory of its own.
    test.expect_free(free);
}

#[test]
fn a_pool_refuses_a_limit_of_nothing() {
    let test = open();
    refused!(
        SharedMemoryPool::new(0, test.device.clone()),
        VmmError::Vmm(Core::ZeroSize { .. })
    );
}

#[test]
fn register_refuses_duplicates_and_bad_capacities() {
    let test = open();
    let mut pool = pool(&test.device);
    pool.allocate_for_model("model", GRANULE).unwrap();
    let before = state(&pool);
    match pool.register_model("model", GIB) {
        Err(VmmError::ModelAlreadyExists(name)) => assert_eq!(name, "model"),
        other => panic!("{other:?}"),
    }
    assert_eq!(
        pool.get_model_stats("model").unwrap().virtual_capacity,
        CAPACITY
    );
    refused!(
        pool.register_model("zero", 0),
        VmmError::Vmm(Core::ZeroSize { .. })
    );
    refused!(
        pool.register_model("huge", usize::MAX),
        VmmError::InvalidOffset {
            offset: 0,
            size: usize::MAX,
            ..
        }
    );
    refused!(
        pool.register_model("large", 1 << 47),
        VmmError::Vmm(Core::Driver(_))
    );
    assert_eq!(state(&pool), before);
    for name in ["zero", "huge", "large"] {
        assert!(pool.get_model_stats(name).is_none());
    }
    // An odd capacity is rounded up to whole pages.
    pool.register_model("odd", GRANULE + 1).unwrap();
    assert_eq!(
        pool.get_model_stats("odd").unwrap().virtual_capacity,
        2 * GRANULE
    );
}

#[test]
fn unknown_models_are_refused_by_every_call() {
    let test = open();
    let mut pool = pool(&test.device);
    let before = state(&pool);
    let name = |result: Result<(), VmmError>| match result {
        Err(VmmError::ModelNotFound(name)) => name,
        other => panic!("{other:?}"),
    };
    assert_eq!(
        name(pool.allocate_for_model("unknown", 1).map(|_| ())),
        "unknown"
    );
    assert_eq!(name(pool.deallocate_for_model("unknown", 0, 1)), "unknown");
    assert_eq!(
        name(pool.deallocate_for_model_address("unknown", 0, 1)),
        "unknown"
    );
    assert_eq!(name(pool.unregister_model("unknown")), "unknown");
    assert!(pool.get_model_stats("unknown").is_none());
    assert_eq!(pool.model_base_address("unknown"), None);
    assert_eq!(state(&pool), before);
}

#[test]
fn allocate_refuses_nothing_and_too_much() {
    let test = open();
    let mut pool = pool(&test.device);
    pool.allocate_for_model("model", GRANULE).unwrap();
    let before = state(&pool);
    refused!(
        pool.allocate_for_model("model", 0),
        VmmError::Vmm(Core::ZeroSize { .. })
    );
    const REST: usize = CAPACITY - GRANULE;
    refused!(
        pool.allocate_for_model("model", CAPACITY),
        VmmError::OutOfVirtualMemory {
            requested: CAPACITY,
            available: REST
        }
    );
    refused!(
        pool.allocate_for_model("model", usize::MAX),
        VmmError::OutOfVirtualMemory {
            requested: usize::MAX,
            available: REST
        }
    );
    assert_eq!(state(&pool), before);
}

#[test]
fn deallocate_refuses_bad_ranges_and_changes_nothing() {
    let test = open();
    let mut pool = pool(&test.device);
    let base = pool.model_base_address("model").unwrap();
    let address = pool.allocate_for_model("model", GRANULE).unwrap();
    assert_eq!(address, base, "first fit");
    let before = state(&pool);
    refused!(
        pool.deallocate_for_model("model", 0, 0),
        VmmError::Vmm(Core::ZeroSize { .. })
    );
    refused!(
        pool.deallocate_for_model("model", CAPACITY, 1),
        VmmError::InvalidOffset {
            offset: CAPACITY,
            size: 1,
            capacity: CAPACITY
        }
    );
    refused!(
        pool.deallocate_for_model("model", 1, usize::MAX),
        VmmError::InvalidOffset {
            offset: 1,
            size: usize::MAX,
            capacity: CAPACITY
        }
    );
    refused!(
        pool.deallocate_for_model("model", GRANULE, 1),
        VmmError::NotMapped {
            offset: GRANULE,
            size: 1
        }
    );
    const TWO: usize = 2 * GRANULE;
    refused!(
        pool.deallocate_for_model("model", 0, TWO),
        VmmError::NotMapped {
            offset: 0,
            size: TWO
        }
    );
    refused!(
        pool.deallocate_for_model_address("model", address, 0),
        VmmError::Vmm(Core::ZeroSize { .. })
    );
    refused!(
        pool.deallocate_for_model_address("model", address + GRANULE, 1),
        VmmError::NotMapped {
            offset: GRANULE,
            size: 1
        }
    );
    refused!(
        pool.deallocate_for_model_address("model", address, usize::MAX),
        VmmError::InvalidOffset { .. }
    );
    for below in [0, base - 1] {
        refused!(
            pool.deallocate_for_model_address("model", below, 1),
            VmmError::NotMapped { offset: 0, size: 1 }
        );
    }
    for above in [base + CAPACITY, usize::MAX] {
        refused!(
            pool.deallocate_for_model_address("model", above, 1),
            VmmError::InvalidOffset { offset, size: 1, capacity: CAPACITY } if offset == above - base
        );
    }
    assert_eq!(state(&pool), before);
    pool.deallocate_for_model("model", 0, GRANULE).unwrap();
    refused!(
        pool.deallocate_for_model("model", 0, GRANULE),
        VmmError::NotMapped { .. }
    );
}

#[test]
fn unregistering_frees_what_the_model_had() {
    let test = open();
    let free = test.free_bytes();
    let mut pool = pool(&test.device);
    pool.register_model("other", CAPACITY).unwrap();
    pool.allocate_for_model("other", LIMIT).unwrap();
    pool.unregister_model("other").unwrap();
    assert_eq!(state(&pool), (0, 1, 0, 0));
    refused!(
        pool.allocate_for_model("other", 1),
        VmmError::ModelNotFound(_)
    );
    // The remaining model can use all of the limit.
    pool.allocate_for_model("model", LIMIT).unwrap();
    pool.unregister_model("model").unwrap();
    assert_eq!(pool.global_stats().num_models, 0);
    assert_eq!(pool.global_stats().physical_usage, 0);
    // The name can be used again.
    pool.register_model("model", CAPACITY).unwrap();
    drop(pool);
    test.expect_in_use(free, 0);
}

#[test]
fn a_range_that_others_hold_is_freed_when_they_drop_it() {
    let test = open();
    let mut pool = pool(&test.device);
    let range = pool.range("model").unwrap();
    range.allocate(0, 2 * GRANULE).unwrap();
    pool.unregister_model("model").unwrap();
    refused!(pool.range("model"), VmmError::ModelNotFound(_));
    assert_eq!(pool.global_stats().num_models, 0);
    assert!(range.is_mapped(0, 2 * GRANULE));
    refused!(range.allocate(2 * GRANULE, 1), Core::Closed);
    assert_eq!(pool.detailed_stats().committed_bytes, 2 * GRANULE);
    pool.register_model("model", CAPACITY).unwrap();
    refused!(
        pool.allocate_for_model("model", LIMIT),
        VmmError::OutOfPhysicalMemory { .. }
    );
    drop(range);
    pool.allocate_for_model("model", LIMIT).unwrap();
}

#[test]
fn the_parts_of_the_detailed_numbers_add_up() {
    let test = open();
    let mut pool = pool(&test.device);
    let address = pool.allocate_for_model("model", 10 * GRANULE + 1).unwrap();
    pool.deallocate_for_model_address("model", address, 3 * GRANULE)
        .unwrap();
    let stats = pool.detailed_stats();
    assert_eq!(stats.limit_bytes, LIMIT);
    assert_eq!(
        stats.parts.live_page_bytes,
        pool.global_stats().physical_usage
    );
    assert_eq!(
        stats.parts.live_page_bytes
            + stats.parts.slack_bytes
            + stats.parts.filling_bytes
            + stats.parts.retiring_bytes
            + stats.parts.parked_bytes
            + stats.parts.quarantined_bytes,
        stats.committed_bytes
    );
    assert!(!stats.to_string().is_empty());
}

#[test]
fn each_device_has_its_own_limit() {
    let test = open();
    let mut pools: Vec<_> = test.all().iter().map(pool).collect();
    pools.push(pool(&test.device));
    for pool in &mut pools {
        pool.allocate_for_model("model", LIMIT).unwrap();
    }
    for pool in &pools {
        assert_eq!(pool.global_stats().physical_usage, LIMIT);
    }
}

#[test]
fn quotas_hold_and_are_changed_while_models_run() {
    let test = open();
    let mut pool = pool(&test.device);
    let quota = Quota::new()
        .guarantee_bytes(16 * MIB)
        .ceiling_bytes(32 * MIB)
        .priority(2);
    pool.register_model_with("sure", CAPACITY - 1, quota)
        .unwrap();
    assert_eq!(
        pool.get_model_stats("sure").unwrap().virtual_capacity,
        CAPACITY,
        "whole pages"
    );
    let sure = pool.model("sure").unwrap();
    assert_eq!(sure.quota(), Ok(quota));
    refused!(
        pool.allocate_for_model("model", 50 * MIB),
        VmmError::OutOfPhysicalMemory { .. }
    );
    pool.allocate_for_model("model", 48 * MIB).unwrap();
    pool.allocate_for_model("sure", 16 * MIB).unwrap();
    refused!(
        sure.set_quota(quota.guarantee_bytes(18 * MIB)),
        Core::QuotaUnsatisfiable { asked_bytes, available_bytes, .. }
            if (asked_bytes, available_bytes) == (18 * MIB, 16 * MIB)
    );
    assert_eq!(sure.quota(), Ok(quota));
    sure.set_quota(quota.guarantee_bytes(0).ceiling_bytes(10 * MIB))
        .unwrap();
    assert_eq!(sure.owed_bytes(), 6 * MIB);
    refused!(
        pool.register_model_with("model", CAPACITY, quota),
        VmmError::ModelAlreadyExists(_)
    );
    refused!(pool.model("none"), VmmError::ModelNotFound(_));
    refused!(pool.range("none"), VmmError::ModelNotFound(_));
    refused!(
        pool.tensor_pool("none", TensorPoolOptions::new()),
        VmmError::ModelNotFound(_)
    );
}

/// Counts how often it is woken.
#[derive(Default)]
struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn a_model_that_waits_is_served_by_one_that_is_told_what_it_owes() {
    let test = open();
    let mut pool = pool(&test.device);
    pool.register_model("waits", CAPACITY).unwrap();
    pool.allocate_for_model("model", LIMIT).unwrap();
    let woken = Arc::new(Woken::default());
    let model = pool.model("model").unwrap();
    model.set_owed_waker(Some(woken.clone().into()));
    refused!(
        pool.allocate_for_model_timeout("waits", 4 * MIB, Duration::ZERO),
        VmmError::OutOfPhysicalMemory {
            requested,
            available: 0
        } if requested == 4 * MIB
    );
    assert_eq!(woken.0.load(Ordering::SeqCst), 1);
    assert_eq!(model.owed_bytes(), 4 * MIB);
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| {
            let pool = &pool;
            pool.allocate_for_model_timeout("waits", 8 * MIB, Duration::MAX)
        });
        while model.owed_bytes() != 8 * MIB {
            std::thread::yield_now();
        }
        let range = pool.range("model").unwrap();
        range.deallocate(0, 8 * MIB).unwrap();
        model.give_back().unwrap();
        let base = pool.model_base_address("waits").unwrap();
        assert_eq!(waits.join().unwrap().unwrap(), base);
    });
    assert_eq!(model.owed_bytes(), 0);
    model.set_owed_waker(None);
    assert_eq!(Arc::strong_count(&woken), 1);
    refused!(
        pool.allocate_for_model_timeout("none", 1, Duration::MAX),
        VmmError::ModelNotFound(_)
    );
}

#[test]
fn only_a_cuda_device_has_memory_of_candle_that_can_be_trimmed() {
    refused!(
        keep_candle_memory(&Device::Cpu, u64::MAX),
        VmmError::UnsupportedDevice
    );
    refused!(
        trim_candle_memory(&Device::Cpu),
        VmmError::UnsupportedDevice
    );
    refused!(
        let_candle_make_room(&Device::Cpu),
        VmmError::UnsupportedDevice
    );
    let test = open();
    let mut pool = pool(&test.device);
    pool.allocate_for_model("model", LIMIT).unwrap();
    assert_eq!(pool.relieve(usize::MAX), 0, "all is in use");
}
