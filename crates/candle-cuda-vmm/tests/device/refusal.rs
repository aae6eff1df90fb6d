//! Calls that an elastic pool refuses, with their errors, and that they change nothing.

use crate::common::{GIB, GRANULE, open, page, refused_with};
use crate::elastic::{capacity, pool, state};
use crate::refused;
use candle_core::Device;
use candle_cuda_vmm::cuda_vmm::{DriverKind, VmmError as Core, sys};
use candle_cuda_vmm::{PhysicalMemoryHandle, SharedMemoryPool, VirtualMemoryPool, VmmError};

/// The error for bytes outside the pool.
fn outside(offset: usize, size: usize) -> VmmError {
    VmmError::InvalidOffset {
        offset,
        size,
        capacity: capacity(),
    }
}

#[test]
fn a_pool_refuses_bad_pages_and_capacities() {
    let test = open();
    let new = |capacity, page| VirtualMemoryPool::new(capacity, page, test.device.clone());
    refused!(new(GIB, 0), VmmError::InvalidPageSize(0));
    refused!(new(GIB, 1), VmmError::InvalidPageSize(1));
    for bad in [GRANULE / 2, 3 * GRANULE, 3 * page()] {
        refused_with(new(GIB, bad), VmmError::InvalidPageSize(bad));
    }
    refused!(new(0, page()), VmmError::Vmm(Core::ZeroSize { .. }));
    refused!(
        new(usize::MAX, page()),
        VmmError::InvalidOffset {
            offset: 0,
            size: usize::MAX,
            ..
        }
    );
    // The driver never has 2^47 bytes of addresses.
    let error = new(1 << 47, page()).map(|_| ()).unwrap_err();
    assert_eq!(
        error.driver_code(),
        Some(sys::CUDA_ERROR_OUT_OF_MEMORY),
        "{error}"
    );
}

#[test]
fn other_devices_are_unsupported() {
    let _alone = open();
    let metal = Device::Metal(candle_core::MetalDevice);
    refused!(
        VirtualMemoryPool::new(GIB, page(), metal.clone()),
        VmmError::UnsupportedDevice
    );
    refused!(
        SharedMemoryPool::new(GIB, metal.clone()),
        VmmError::UnsupportedDevice
    );
    refused!(
        PhysicalMemoryHandle::new(GRANULE, &metal),
        VmmError::UnsupportedDevice
    );
    // Without the feature `cuda` a CUDA device can still be named, and must not be simulated.
    #[cfg(not(feature = "cuda"))]
    refused!(
        VirtualMemoryPool::new(GIB, page(), Device::Cuda(candle_core::CudaDevice)),
        VmmError::UnsupportedDevice
    );
}

#[test]
fn allocate_refuses_bad_ranges_and_changes_nothing() {
    let test = open();
    let (mut pool, page) = (pool(&test.device), page());
    pool.allocate(page, page).unwrap();
    let before = state(&pool);
    refused!(
        pool.allocate(0, 0),
        VmmError::Vmm(Core::ZeroSize { what: "size" })
    );
    for (offset, size) in [(0, capacity() + 1), (capacity(), 1), (usize::MAX, 2)] {
        refused_with(pool.allocate(offset, size), outside(offset, size));
    }
    for (offset, size) in [(page, page), (0, 3 * page)] {
        refused_with(
            pool.allocate(offset, size),
            VmmError::AlreadyMapped { offset, size },
        );
    }
    assert_eq!(state(&pool), before);
    assert!(!pool.is_mapped(0, 1) && !pool.is_mapped(2 * page, 1));
}

#[test]
fn deallocate_refuses_bad_ranges_and_changes_nothing() {
    let test = open();
    let (mut pool, page) = (pool(&test.device), page());
    pool.allocate(0, 2 * page).unwrap();
    pool.allocate(3 * page, page).unwrap();
    let before = state(&pool);
    refused!(
        pool.deallocate(0, 0),
        VmmError::Vmm(Core::ZeroSize { what: "size" })
    );
    for (offset, size) in [(0, capacity() + 1), (2, usize::MAX)] {
        refused_with(pool.deallocate(offset, size), outside(offset, size));
    }
    for (offset, size) in [(2 * page, page), (0, 4 * page)] {
        refused_with(
            pool.deallocate(offset, size),
            VmmError::NotMapped { offset, size },
        );
    }
    assert_eq!(state(&pool), before);
    pool.deallocate(3 * page, page).unwrap();
    refused_with(
        pool.deallocate(3 * page, page),
        VmmError::NotMapped {
            offset: 3 * page,
            size: page,
        },
    );
}

#[test]
fn more_than_the_device_has_is_out_of_memory_and_leaves_nothing() {
    let test = open();
    let total = test.core.total_bytes();
    // In whole pages, so that the request would succeed if nothing else were live.
    let all = total - total % page();
    let mut pool = VirtualMemoryPool::new(2 * total, page(), test.device.clone()).unwrap();
    pool.allocate(0, page()).unwrap();
    let (before, free) = (state(&pool), test.free_bytes());
    let error = pool.allocate(page(), all).unwrap_err();
    assert!(error.is_out_of_memory() && error.is_retryable(), "{error}");
    if test.kind == DriverKind::Simulated {
        refused_with(
            pool.allocate(page(), all),
            VmmError::OutOfPhysicalMemory {
                requested: total,
                available: total - page(),
            },
        );
    }
    assert_eq!(state(&pool), before);
    test.expect_in_use(free, 0);
    pool.allocate(page(), page()).unwrap();
}
