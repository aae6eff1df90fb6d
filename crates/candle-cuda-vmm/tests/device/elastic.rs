//! The elastic pool.

use crate::common::{open, page, refused_with};
use candle_core::Device;
use candle_cuda_vmm::{VirtualMemoryPool, VmmError};

/// The capacity of [`pool`].
pub fn capacity() -> usize {
    64 * page()
}

pub fn pool(device: &Device) -> VirtualMemoryPool {
    VirtualMemoryPool::new(capacity(), page(), device.clone()).unwrap()
}

/// The numbers that a refused call must not change: bytes of live pages, live pages, live bytes,
/// fragmentation.
pub fn state(pool: &VirtualMemoryPool) -> (usize, usize, usize, f32) {
    let (stats, detailed) = (pool.stats(), pool.detailed_stats());
    assert_eq!(stats.physical_usage, pool.physical_memory_usage());
    assert_eq!(stats.physical_usage, stats.mapped_pages * page());
    (
        stats.physical_usage,
        stats.mapped_pages,
        detailed.live_bytes,
        stats.fragmentation_ratio,
    )
}

#[test]
fn allocations_stand_where_they_are_put_and_are_counted() {
    let test = open();
    let mut pool = pool(&test.device);
    for (offset, size) in [
        (0, 2 * page()),
        (2 * page(), 2 * page()),
        (8 * page(), page()),
    ] {
        let address = pool.allocate(offset, size).unwrap();
        assert_eq!(address, pool.base_address() + offset);
        assert!(pool.is_mapped(offset, size));
    }
    assert_eq!(state(&pool).0, 5 * page());
    pool.deallocate(2 * page(), 2 * page()).unwrap();
    assert_eq!(pool.stats().mapped_pages, 3);
    assert!(pool.is_mapped(0, 2 * page()) && pool.is_mapped(8 * page(), page()));
    assert!(!pool.is_mapped(2 * page(), 2 * page()));
    assert!(!pool.is_mapped(0, 5 * page() / 2));
}

#[test]
fn part_of_an_allocation_can_be_freed_and_several_at_once() {
    let test = open();
    let mut pool = pool(&test.device);
    pool.allocate(0, 4 * page()).unwrap();
    pool.allocate(4 * page(), 4 * page()).unwrap();
    pool.deallocate(page(), 5 * page()).unwrap();
    assert_eq!(state(&pool).0, 3 * page());
    assert!(pool.is_mapped(0, page()) && pool.is_mapped(6 * page(), 2 * page()));
    pool.allocate(page(), 5 * page()).unwrap();
    assert!(pool.is_mapped(0, 8 * page()));
}

#[test]
fn a_cache_grows_token_by_token_though_tokens_share_pages() {
    let test = open();
    const TOKENS: usize = 100;
    // 300 KiB if a page has 2 MiB.
    let token_bytes = 75 * page() / 512;
    let mut pool = pool(&test.device);
    for token in 0..TOKENS {
        let address = pool.allocate(token * token_bytes, token_bytes).unwrap();
        assert_eq!(address, pool.base_address() + token * token_bytes);
        let live = (token + 1) * token_bytes;
        assert_eq!(pool.stats().mapped_pages, live.div_ceil(page()));
        assert_eq!(pool.detailed_stats().live_bytes, live);
    }
    // The first token shares its page with the next six: the page stays until all are freed.
    for token in 0..6 {
        pool.deallocate(token * token_bytes, token_bytes).unwrap();
        assert!(!pool.is_mapped(token * token_bytes, 1));
        assert!(pool.is_mapped((token + 1) * token_bytes, token_bytes));
        assert_eq!(
            pool.stats().mapped_pages,
            (TOKENS * token_bytes).div_ceil(page()),
            "{token}"
        );
    }
    // The seventh reaches into the second page, so only the first becomes free.
    pool.deallocate(6 * token_bytes, token_bytes).unwrap();
    assert_eq!(
        pool.stats().mapped_pages,
        (TOKENS * token_bytes).div_ceil(page()) - 1
    );
    pool.deallocate(7 * token_bytes, (TOKENS - 7) * token_bytes)
        .unwrap();
    assert_eq!(state(&pool), (0, 0, 0, 0.0));
}

#[test]
fn unaligned_bytes_are_live_and_their_pages_backed() {
    let test = open();
    let mut pool = pool(&test.device);
    let address = pool.allocate(page() - 1, 2).unwrap();
    assert_eq!(address, pool.base_address() + page() - 1);
    assert_eq!(pool.stats().mapped_pages, 2);
    assert_eq!(pool.detailed_stats().live_bytes, 2);
    assert!(pool.is_mapped(page() - 1, 2));
    assert!(!pool.is_mapped(page() - 2, 2) && !pool.is_mapped(page(), 2));
    // The other bytes of the same pages can be allocated, byte by byte.
    pool.allocate(page() - 2, 1).unwrap();
    pool.allocate(page() + 1, 1).unwrap();
    assert_eq!(pool.stats().mapped_pages, 2);
    refused_with(
        pool.allocate(page() + 1, 1),
        VmmError::AlreadyMapped {
            offset: page() + 1,
            size: 1,
        },
    );
    pool.deallocate(page() - 2, 4).unwrap();
    assert_eq!(pool.stats().mapped_pages, 0);
}

#[test]
fn is_mapped_is_false_for_bad_ranges() {
    let test = open();
    let mut pool = pool(&test.device);
    pool.allocate(0, capacity()).unwrap();
    assert!(pool.is_mapped(0, capacity()));
    assert!(!pool.is_mapped(0, 0));
    assert!(!pool.is_mapped(1, capacity()));
    assert!(!pool.is_mapped(capacity(), 1));
    assert!(!pool.is_mapped(usize::MAX, 2));
}

#[test]
fn fragmentation_is_of_the_unused_bytes() {
    let test = open();
    let mut pool = VirtualMemoryPool::new(8 * page(), page(), test.device.clone()).unwrap();
    let ratio = |pool: &VirtualMemoryPool| pool.stats().fragmentation_ratio;
    assert_eq!(ratio(&pool), 0.0);
    pool.allocate(2 * page(), page()).unwrap();
    assert!((ratio(&pool) - (1.0 - 5.0 / 7.0)).abs() < 1e-6);
    // Counted in bytes: one byte in the middle of a page splits the run of five pages.
    pool.allocate(5 * page() + page() / 2, 1).unwrap();
    let (largest, unused) = (5 * page() / 2, 7 * page() - 1);
    assert!((ratio(&pool) - (1.0 - largest as f32 / unused as f32)).abs() < 1e-6);
    pool.deallocate(5 * page() + page() / 2, 1).unwrap();
    pool.deallocate(2 * page(), page()).unwrap();
    pool.allocate(0, 3 * page()).unwrap();
    assert_eq!(ratio(&pool), 0.0);
    pool.allocate(3 * page(), 5 * page()).unwrap();
    assert_eq!(ratio(&pool), 0.0);
}

#[test]
fn allocating_and_freeing_over_and_over_ends_at_nothing() {
    let test = open();
    let free = test.free_bytes();
    let mut pool = pool(&test.device);
    for _ in 0..100 {
        pool.allocate(0, 2 * page()).unwrap();
        pool.deallocate(0, 2 * page()).unwrap();
    }
    assert_eq!(state(&pool), (0, 0, 0, 0.0));
    drop(pool);
    test.expect_in_use(free, 0);
}

#[test]
fn every_page_of_a_pool_can_be_an_allocation() {
    let test = open();
    let mut pool = pool(&test.device);
    for index in 0..capacity() / page() {
        pool.allocate(index * page(), page()).unwrap();
    }
    assert_eq!(pool.physical_memory_usage(), capacity());
}

#[test]
fn each_device_has_its_own_pools() {
    let test = open();
    let mut pools = Vec::new();
    for (index, device) in test.all().into_iter().enumerate() {
        for extra in 1..=2 {
            let mut pool = VirtualMemoryPool::new(capacity(), page(), device.clone()).unwrap();
            let size = (index + extra) * page();
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
                for index in 0..8 {
                    let offset = (thread * 8 + index) * page();
                    pool.lock().unwrap().allocate(offset, page()).unwrap();
                }
            });
        }
    });
    assert_eq!(
        pool.into_inner().unwrap().physical_memory_usage(),
        32 * page()
    );
}
