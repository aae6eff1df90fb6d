//! The elastic pool.

use crate::common::{GIB, KIB, MIB, PAGE, open};
use crate::refused;
use candle_core::Device;
use candle_cuda_vmm::cuda_vmm::VmmError as Core;
use candle_cuda_vmm::{VirtualMemoryPool, VmmError};

const CAPACITY: usize = 64 * PAGE;

fn pool(device: &Device) -> VirtualMemoryPool {
    VirtualMemoryPool::new(CAPACITY, PAGE, device.clone()).unwrap()
}

/// What a refused call must leave as it was.
fn state(pool: &VirtualMemoryPool) -> (usize, usize, usize, f32) {
    let (stats, detailed) = (pool.stats(), pool.detailed_stats());
    assert_eq!(stats.physical_usage, pool.physical_memory_usage());
    assert_eq!(stats.physical_usage, stats.mapped_pages * PAGE);
    (
        stats.physical_usage,
        stats.mapped_pages,
        detailed.live_bytes,
        stats.fragmentation_ratio,
    )
}

#[test]
fn the_quick_start_runs_as_written() {
    let test = open();
    let mut pool = VirtualMemoryPool::new(128 * GIB, PAGE, test.device.clone()).unwrap();
    assert_eq!(pool.capacity(), 128 * GIB);
    assert_eq!(pool.page_size(), PAGE);
    assert_eq!(pool.physical_memory_usage(), 0);
    let address = pool.allocate(0, GIB).unwrap();
    assert_eq!(address, pool.base_address());
    assert_eq!(pool.physical_memory_usage(), GIB);
    pool.deallocate(0, GIB).unwrap();
    assert_eq!(pool.physical_memory_usage(), 0);
}

#[test]
fn allocations_stand_where_they_are_put_and_are_counted() {
    let test = open();
    let mut pool = pool(&test.device);
    for (offset, size) in [(0, 4 * MIB), (4 * MIB, 4 * MIB), (16 * MIB, 2 * MIB)] {
        let address = pool.allocate(offset, size).unwrap();
        assert_eq!(address, pool.base_address() + offset);
        assert!(pool.is_mapped(offset, size));
    }
    assert_eq!(state(&pool).0, 10 * MIB);
    pool.deallocate(4 * MIB, 4 * MIB).unwrap();
    assert_eq!(pool.stats().mapped_pages, 3);
    assert!(pool.is_mapped(0, 4 * MIB) && pool.is_mapped(16 * MIB, 2 * MIB));
    assert!(!pool.is_mapped(4 * MIB, 4 * MIB));
    assert!(!pool.is_mapped(0, 5 * MIB));
}

#[test]
fn part_of_an_allocation_can_be_freed_and_several_at_once() {
    let test = open();
    let mut pool = pool(&test.device);
    pool.allocate(0, 8 * MIB).unwrap();
    pool.allocate(8 * MIB, 8 * MIB).unwrap();
    pool.deallocate(2 * MIB, 10 * MIB).unwrap();
    assert_eq!(state(&pool).0, 6 * MIB);
    assert!(pool.is_mapped(0, 2 * MIB) && pool.is_mapped(12 * MIB, 4 * MIB));
    pool.allocate(2 * MIB, 10 * MIB).unwrap();
    assert!(pool.is_mapped(0, 16 * MIB));
}

#[test]
fn a_cache_grows_token_by_token_though_tokens_share_pages() {
    let test = open();
    const TOKENS: usize = 100;
    const TOKEN: usize = 300 * KIB;
    let mut pool = pool(&test.device);
    for token in 0..TOKENS {
        let address = pool.allocate(token * TOKEN, TOKEN).unwrap();
        assert_eq!(address, pool.base_address() + token * TOKEN);
        let live = (token + 1) * TOKEN;
        assert_eq!(pool.stats().mapped_pages, live.div_ceil(PAGE));
        assert_eq!(pool.detailed_stats().live_bytes, live);
    }
    // The first token shares its page with the next six: the page stays until they are gone.
    for token in 0..6 {
        pool.deallocate(token * TOKEN, TOKEN).unwrap();
        assert!(!pool.is_mapped(token * TOKEN, 1));
        assert!(pool.is_mapped((token + 1) * TOKEN, TOKEN));
        assert_eq!(
            pool.stats().mapped_pages,
            (TOKENS * TOKEN).div_ceil(PAGE),
            "{token}"
        );
    }
    // The seventh reaches into the second page, so only the first becomes free.
    pool.deallocate(6 * TOKEN, TOKEN).unwrap();
    assert_eq!(
        pool.stats().mapped_pages,
        (TOKENS * TOKEN).div_ceil(PAGE) - 1
    );
    pool.deallocate(7 * TOKEN, (TOKENS - 7) * TOKEN).unwrap();
    assert_eq!(state(&pool), (0, 0, 0, 0.0));
}

#[test]
fn unaligned_bytes_are_live_and_their_pages_backed() {
    let test = open();
    let mut pool = pool(&test.device);
    let address = pool.allocate(PAGE - 1, 2).unwrap();
    assert_eq!(address, pool.base_address() + PAGE - 1);
    assert_eq!(pool.stats().mapped_pages, 2);
    assert_eq!(pool.detailed_stats().live_bytes, 2);
    assert!(pool.is_mapped(PAGE - 1, 2));
    assert!(!pool.is_mapped(PAGE - 2, 2) && !pool.is_mapped(PAGE, 2));
    // Its neighbours in the same pages are free to take, byte by byte.
    pool.allocate(PAGE - 2, 1).unwrap();
    pool.allocate(PAGE + 1, 1).unwrap();
    assert_eq!(pool.stats().mapped_pages, 2);
    refused!(
        pool.allocate(PAGE + 1, 1),
        VmmError::AlreadyMapped { size: 1, .. }
    );
    pool.deallocate(PAGE - 2, 4).unwrap();
    assert_eq!(pool.stats().mapped_pages, 0);
}

#[test]
fn a_capacity_is_rounded_up_to_whole_pages() {
    let test = open();
    let pool = VirtualMemoryPool::new(3 * PAGE + 1, PAGE, test.device.clone()).unwrap();
    assert_eq!(pool.capacity(), 4 * PAGE);
    let pool = VirtualMemoryPool::new(3 * PAGE, 2 * PAGE, test.device.clone()).unwrap();
    assert_eq!((pool.capacity(), pool.page_size()), (4 * PAGE, 2 * PAGE));
    assert_eq!(pool.base_address() % (2 * PAGE), 0);
}

#[test]
fn larger_pages_are_counted_as_such() {
    let test = open();
    let mut pool = VirtualMemoryPool::new(16 * PAGE, 4 * PAGE, test.device.clone()).unwrap();
    pool.allocate(0, 5 * PAGE).unwrap();
    let stats = pool.stats();
    assert_eq!((stats.mapped_pages, stats.physical_usage), (2, 8 * PAGE));
}

#[test]
fn a_pool_refuses_bad_pages_and_capacities() {
    let test = open();
    let new = |capacity, page| VirtualMemoryPool::new(capacity, page, test.device.clone());
    refused!(new(GIB, 0), VmmError::InvalidPageSize(0));
    refused!(new(GIB, 1), VmmError::InvalidPageSize(1));
    const BELOW: usize = PAGE / 2;
    refused!(new(GIB, BELOW), VmmError::InvalidPageSize(BELOW));
    const ODD: usize = 3 * PAGE;
    refused!(new(GIB, ODD), VmmError::InvalidPageSize(ODD));
    refused!(new(0, PAGE), VmmError::Vmm(Core::ZeroSize { .. }));
    refused!(
        new(usize::MAX, PAGE),
        VmmError::InvalidOffset {
            offset: 0,
            size: usize::MAX,
            ..
        }
    );
    // 2^47 bytes of addresses are never to be had.
    let error = new(1 << 47, PAGE).map(|_| ()).unwrap_err();
    assert_eq!(
        error.driver_code(),
        Some(candle_cuda_vmm::cuda_vmm::sys::CUDA_ERROR_OUT_OF_MEMORY),
        "{error}"
    );
}

#[test]
fn other_devices_are_unsupported() {
    let _alone = open();
    let metal = Device::Metal(candle_core::MetalDevice);
    refused!(
        VirtualMemoryPool::new(GIB, PAGE, metal.clone()),
        VmmError::UnsupportedDevice
    );
    refused!(
        candle_cuda_vmm::SharedMemoryPool::new(GIB, metal.clone()),
        VmmError::UnsupportedDevice
    );
    refused!(
        candle_cuda_vmm::PhysicalMemoryHandle::new(PAGE, &metal),
        VmmError::UnsupportedDevice
    );
    // Without the feature a CUDA device can be named all the same, and must not be simulated.
    #[cfg(not(feature = "cuda"))]
    refused!(
        VirtualMemoryPool::new(GIB, PAGE, Device::Cuda(candle_core::CudaDevice)),
        VmmError::UnsupportedDevice
    );
}

#[test]
fn allocate_refuses_bad_ranges_and_changes_nothing() {
    let test = open();
    let mut pool = pool(&test.device);
    pool.allocate(PAGE, PAGE).unwrap();
    let before = state(&pool);
    refused!(
        pool.allocate(0, 0),
        VmmError::Vmm(Core::ZeroSize { what: "size" })
    );
    const MORE: usize = CAPACITY + 1;
    refused!(
        pool.allocate(0, MORE),
        VmmError::InvalidOffset {
            offset: 0,
            size: MORE,
            capacity: CAPACITY
        }
    );
    refused!(
        pool.allocate(CAPACITY, 1),
        VmmError::InvalidOffset {
            offset: CAPACITY,
            size: 1,
            capacity: CAPACITY
        }
    );
    refused!(
        pool.allocate(usize::MAX, 2),
        VmmError::InvalidOffset {
            offset: usize::MAX,
            size: 2,
            capacity: CAPACITY
        }
    );
    refused!(
        pool.allocate(PAGE, PAGE),
        VmmError::AlreadyMapped {
            offset: PAGE,
            size: PAGE
        }
    );
    const THREE: usize = 3 * PAGE;
    refused!(
        pool.allocate(0, THREE),
        VmmError::AlreadyMapped {
            offset: 0,
            size: THREE
        }
    );
    assert_eq!(state(&pool), before);
    assert!(!pool.is_mapped(0, 1) && !pool.is_mapped(2 * PAGE, 1));
}

#[test]
fn deallocate_refuses_bad_ranges_and_changes_nothing() {
    let test = open();
    let mut pool = pool(&test.device);
    pool.allocate(0, 2 * PAGE).unwrap();
    pool.allocate(3 * PAGE, PAGE).unwrap();
    let before = state(&pool);
    refused!(
        pool.deallocate(0, 0),
        VmmError::Vmm(Core::ZeroSize { what: "size" })
    );
    const MORE: usize = CAPACITY + 1;
    refused!(
        pool.deallocate(0, MORE),
        VmmError::InvalidOffset {
            offset: 0,
            size: MORE,
            capacity: CAPACITY
        }
    );
    refused!(
        pool.deallocate(2, usize::MAX),
        VmmError::InvalidOffset {
            offset: 2,
            size: usize::MAX,
            capacity: CAPACITY
        }
    );
    const HOLE: usize = 2 * PAGE;
    refused!(
        pool.deallocate(HOLE, PAGE),
        VmmError::NotMapped {
            offset: HOLE,
            size: PAGE
        }
    );
    const FOUR: usize = 4 * PAGE;
    refused!(
        pool.deallocate(0, FOUR),
        VmmError::NotMapped {
            offset: 0,
            size: FOUR
        }
    );
    assert_eq!(state(&pool), before);
    pool.deallocate(3 * PAGE, PAGE).unwrap();
    refused!(
        pool.deallocate(3 * PAGE, PAGE),
        VmmError::NotMapped { size: PAGE, .. }
    );
}

#[test]
fn is_mapped_is_false_for_bad_ranges() {
    let test = open();
    let mut pool = pool(&test.device);
    pool.allocate(0, CAPACITY).unwrap();
    assert!(pool.is_mapped(0, CAPACITY));
    assert!(!pool.is_mapped(0, 0));
    assert!(!pool.is_mapped(1, CAPACITY));
    assert!(!pool.is_mapped(CAPACITY, 1));
    assert!(!pool.is_mapped(usize::MAX, 2));
}

#[test]
fn more_than_the_device_has_is_out_of_memory_and_leaves_nothing() {
    let test = open();
    let total = test.core.total_bytes();
    let mut pool = VirtualMemoryPool::new(2 * total, PAGE, test.device.clone()).unwrap();
    pool.allocate(0, PAGE).unwrap();
    let (before, free) = (state(&pool), test.free_bytes());
    let error = pool.allocate(PAGE, total).unwrap_err();
    assert!(error.is_out_of_memory() && error.is_later(), "{error}");
    if test.kind == candle_cuda_vmm::cuda_vmm::DriverKind::Simulated {
        refused!(
            pool.allocate(PAGE, total),
            VmmError::OutOfPhysicalMemory { requested, available }
                if requested == total && available == total - PAGE
        );
    }
    assert_eq!(state(&pool), before);
    test.expect_in_use(free, 0);
    pool.allocate(PAGE, PAGE).unwrap();
}

#[test]
fn fragmentation_is_of_the_unused_bytes() {
    let test = open();
    let mut pool = VirtualMemoryPool::new(8 * PAGE, PAGE, test.device.clone()).unwrap();
    let ratio = |pool: &VirtualMemoryPool| pool.stats().fragmentation_ratio;
    assert_eq!(ratio(&pool), 0.0);
    pool.allocate(2 * PAGE, PAGE).unwrap();
    assert!((ratio(&pool) - (1.0 - 5.0 / 7.0)).abs() < 1e-6);
    // By the byte: one byte in the middle of a page parts the run of five pages.
    pool.allocate(5 * PAGE + PAGE / 2, 1).unwrap();
    let (largest, unused) = (5 * PAGE / 2, 7 * PAGE - 1);
    assert!((ratio(&pool) - (1.0 - largest as f32 / unused as f32)).abs() < 1e-6);
    pool.deallocate(5 * PAGE + PAGE / 2, 1).unwrap();
    pool.deallocate(2 * PAGE, PAGE).unwrap();
    pool.allocate(0, 3 * PAGE).unwrap();
    assert_eq!(ratio(&pool), 0.0);
    pool.allocate(3 * PAGE, 5 * PAGE).unwrap();
    assert_eq!(ratio(&pool), 0.0);
}

#[test]
fn allocating_and_freeing_over_and_over_ends_at_nothing() {
    let test = open();
    let free = test.free_bytes();
    let mut pool = pool(&test.device);
    for _ in 0..100 {
        pool.allocate(0, 4 * MIB).unwrap();
        pool.deallocate(0, 4 * MIB).unwrap();
    }
    assert_eq!(state(&pool), (0, 0, 0, 0.0));
    drop(pool);
    test.expect_in_use(free, 0);
}

#[test]
fn every_page_of_a_pool_can_be_an_allocation() {
    let test = open();
    let mut pool = pool(&test.device);
    for page in 0..CAPACITY / PAGE {
        pool.allocate(page * PAGE, PAGE).unwrap();
    }
    assert_eq!(pool.physical_memory_usage(), CAPACITY);
}

#[test]
fn each_device_has_its_own_pools() {
    let test = open();
    let mut pools = Vec::new();
    for (index, device) in test.all().into_iter().enumerate() {
        for extra in 1..=2 {
            let mut pool = VirtualMemoryPool::new(CAPACITY, PAGE, device.clone()).unwrap();
            let size = (index + extra) * PAGE;
            pool.allocate(0, size).unwrap();
            pools.push((pool, size));
        }
    }
    for (pool, size) in &pools {
        assert_eq!(pool.physical_memory_usage(), *size);
    }
    let bases: std::collections::BTreeSet<_> =
        pools.iter().map(|(pool, _)| pool.base_address()).collect();
    assert_eq!(bases.len(), pools.len());
}

#[test]
fn a_pool_can_be_used_from_several_threads() {
    let test = open();
    let pool = std::sync::Mutex::new(pool(&test.device));
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let pool = &pool;
            scope.spawn(move || {
                for page in 0..8 {
                    let offset = (thread * 8 + page) * PAGE;
                    pool.lock().unwrap().allocate(offset, PAGE).unwrap();
                }
            });
        }
    });
    assert_eq!(
        pool.into_inner().unwrap().physical_memory_usage(),
        32 * PAGE
    );
}
