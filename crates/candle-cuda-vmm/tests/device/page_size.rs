//! The page of an elastic pool.

use crate::bytes::{expect_pattern, pattern, write};
use crate::common::{GRANULE, open, page};
use candle_cuda_vmm::VirtualMemoryPool;
use candle_cuda_vmm::cuda_vmm::Stream;

#[test]
fn a_capacity_is_rounded_up_to_whole_pages() {
    let test = open();
    let pool = VirtualMemoryPool::new(3 * page() + 1, page(), test.device.clone()).unwrap();
    assert_eq!(pool.capacity(), 4 * page());
    let pool = VirtualMemoryPool::new(3 * page(), 2 * page(), test.device.clone()).unwrap();
    assert_eq!(
        (pool.capacity(), pool.page_size()),
        (4 * page(), 2 * page())
    );
    assert_eq!(pool.base_address() % (2 * page()), 0);
}

#[test]
fn larger_pages_are_counted_as_such() {
    let test = open();
    let mut pool = VirtualMemoryPool::new(16 * page(), 4 * page(), test.device.clone()).unwrap();
    pool.allocate(0, 5 * page()).unwrap();
    let stats = pool.stats();
    assert_eq!((stats.mapped_pages, stats.physical_usage), (2, 8 * page()));
}

#[test]
fn pools_of_different_pages_live_on_one_device() {
    let test = open();
    let stream = Stream::new(&test.core).unwrap();
    let free = test.free_bytes();
    let mut pools = Vec::new();
    let mut backed_bytes = 0;
    for page in [GRANULE, page(), 2 * page(), 4 * GRANULE] {
        let mut pool = VirtualMemoryPool::new(8 * page, page, test.device.clone()).unwrap();
        assert_eq!((pool.capacity(), pool.page_size()), (8 * page, page));
        assert_eq!(pool.base_address() % page, 0);
        // A page's length, on two pages.
        let address = pool.allocate(page / 2, page).unwrap();
        write(&stream, address, &pattern(address, page));
        let stats = pool.stats();
        assert_eq!((stats.mapped_pages, stats.physical_usage), (2, 2 * page));
        pools.push(pool);
        backed_bytes += 2 * page;
        test.expect_in_use(free, backed_bytes);
    }
    for (index, pool) in pools.iter().enumerate() {
        for other in &pools[..index] {
            let above = pool.base_address() >= other.base_address() + other.capacity();
            let below = pool.base_address() + pool.capacity() <= other.base_address();
            assert!(above || below, "two pools have the same addresses");
        }
    }
    // Each is freed in turn, and the others keep their contents.
    while !pools.is_empty() {
        for pool in &pools {
            let (page, address) = (pool.page_size(), pool.base_address());
            assert_eq!(pool.physical_memory_usage(), 2 * page);
            let written = address + page / 2;
            expect_pattern(&stream, written, written, page);
        }
        backed_bytes -= pools.remove(0).physical_memory_usage();
        test.expect_in_use(free, backed_bytes);
    }
}
