//! The page of an elastic pool.

use crate::common::{open, page};
use candle_cuda_vmm::VirtualMemoryPool;

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
