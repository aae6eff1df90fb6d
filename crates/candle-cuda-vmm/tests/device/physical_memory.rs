//! Physical memory without mappings.

use crate::common::{GRANULE, open};
use crate::refused;
use candle_cuda_vmm::cuda_vmm::VmmError as Core;
use candle_cuda_vmm::{PhysicalMemoryHandle, VirtualAddressRange, VmmError, map_memory};

#[test]
fn physical_memory_knows_its_extent_and_goes_back() {
    let test = open();
    let free = test.free_bytes();
    let memory = PhysicalMemoryHandle::new(3 * GRANULE, &test.device).unwrap();
    assert_eq!(
        (memory.size(), memory.device_ordinal()),
        (3 * GRANULE, test.ordinal())
    );
    test.expect_in_use(free, 3 * GRANULE);
    drop(memory);
    test.expect_in_use(free, 0);
}

#[test]
fn physical_memory_refuses_bad_sizes() {
    let test = open();
    let new = |size| PhysicalMemoryHandle::new(size, &test.device);
    refused!(new(0), VmmError::Vmm(Core::ZeroSize { .. }));
    refused!(
        new(1),
        VmmError::InvalidAlignment {
            actual: 1,
            required: GRANULE
        }
    );
    refused!(
        new(usize::MAX),
        VmmError::InvalidAlignment {
            actual: usize::MAX,
            required: GRANULE
        }
    );
    let free = test.free_bytes();
    let error = new(2 * test.core.total_bytes().next_multiple_of(GRANULE)).unwrap_err();
    assert!(error.is_out_of_memory(), "{error}");
    test.expect_in_use(free, 0);
}

#[test]
fn raw_handles_of_no_device_can_be_held() {
    let _test = open();
    for ordinal in [-1, 1000] {
        // SAFETY: there is no such device, so the handle is never used.
        let memory = unsafe { PhysicalMemoryHandle::from_raw(12345, GRANULE, ordinal) };
        assert_eq!(
            (memory.as_raw(), memory.size(), memory.device_ordinal()),
            (12345, GRANULE, ordinal)
        );
        if let Ok(range) = VirtualAddressRange::new(64 * GRANULE, GRANULE) {
            refused!(
                map_memory(&range, 0, &memory, 0, GRANULE),
                VmmError::UnsupportedDevice
            );
        }
        assert_eq!(memory.into_raw(), 12345);
    }
}
