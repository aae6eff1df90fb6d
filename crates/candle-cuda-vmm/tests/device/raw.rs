//! The raw driver calls, with the default driver.

use crate::common::{GRANULE, open};
use candle_cuda_vmm::Result;
use candle_cuda_vmm::cuda_ffi::{self, AccessFlags, AllocationProp};
use candle_cuda_vmm::cuda_vmm::sys::{self, CUresult, DriverFunction};
use candle_cuda_vmm::{VmmError, cuda_vmm};

/// Fails unless the result is one of these codes from this call.
fn refused<T>(result: Result<T>, call: DriverFunction, codes: &[CUresult]) {
    match result.map(|_| ()) {
        Err(VmmError::Vmm(cuda_vmm::VmmError::Driver(error))) => {
            assert_eq!(error.call, call);
            assert!(codes.contains(&error.code), "{error}");
            assert!(error.name.starts_with("CUDA_ERROR_"), "{error}");
        }
        other => panic!("expected {call} to fail, got {other:?}"),
    }
}

const INVALID: &[CUresult] = &[sys::CUDA_ERROR_INVALID_VALUE];
const NO_DEVICE: &[CUresult] = &[sys::CUDA_ERROR_INVALID_DEVICE];

#[test]
fn memory_is_made_mapped_and_given_back_call_by_call() {
    let test = open();
    if !test.is_default() {
        return;
    }
    let free = test.free_bytes();
    // SAFETY: everything below is created here, used within its bounds, and freed once. No device
    // work is queued on it.
    unsafe {
        let handle =
            cuda_ffi::mem_create(2 * GRANULE, &AllocationProp::device(test.ordinal())).unwrap();
        test.expect_in_use(free, 2 * GRANULE);
        let address = cuda_ffi::mem_address_reserve(8 * GRANULE, GRANULE, 0).unwrap();
        cuda_ffi::mem_map(address, 2 * GRANULE, 0, handle).unwrap();
        cuda_ffi::mem_set_access(address, 2 * GRANULE, test.ordinal(), AccessFlags::ReadWrite)
            .unwrap();
        cuda_ffi::mem_unmap(address, 2 * GRANULE).unwrap();
        cuda_ffi::mem_release(handle).unwrap();
        cuda_ffi::mem_address_free(address, 8 * GRANULE).unwrap();
    }
    test.expect_in_use(free, 0);
}

#[test]
fn the_drivers_refusals_keep_call_and_code() {
    let test = open();
    if !test.is_default() {
        return;
    }
    let device = AllocationProp::device(test.ordinal());
    use DriverFunction::*;
    // SAFETY: as above. The calls that must fail change nothing.
    unsafe {
        refused(cuda_ffi::mem_create(0, &device), cuMemCreate, INVALID);
        refused(
            cuda_ffi::mem_create(GRANULE + 1, &device),
            cuMemCreate,
            INVALID,
        );
        let more = 2 * test.core.total_bytes().next_multiple_of(GRANULE);
        let error = cuda_ffi::mem_create(more, &device).unwrap_err();
        assert!(error.is_out_of_memory() && error.is_retryable(), "{error}");
        for ordinal in [-1, 1000] {
            let nowhere = AllocationProp::device(ordinal);
            refused(
                cuda_ffi::mem_create(GRANULE, &nowhere),
                cuMemCreate,
                NO_DEVICE,
            );
        }

        refused(
            cuda_ffi::mem_address_reserve(0, GRANULE, 0),
            cuMemAddressReserve,
            INVALID,
        );
        refused(
            cuda_ffi::mem_address_reserve(GRANULE + 1, GRANULE, 0),
            cuMemAddressReserve,
            INVALID,
        );
        refused(
            cuda_ffi::mem_address_reserve(1 << 47, GRANULE, 0),
            cuMemAddressReserve,
            &[sys::CUDA_ERROR_OUT_OF_MEMORY],
        );

        let handle = cuda_ffi::mem_create(2 * GRANULE, &device).unwrap();
        let address = cuda_ffi::mem_address_reserve(8 * GRANULE, GRANULE, 0).unwrap();
        refused(
            cuda_ffi::mem_map(address, GRANULE, GRANULE, handle),
            cuMemMap,
            &[sys::CUDA_ERROR_NOT_SUPPORTED],
        );
        cuda_ffi::mem_map(address, 2 * GRANULE, 0, handle).unwrap();
        refused(
            cuda_ffi::mem_map(address, 2 * GRANULE, 0, handle),
            cuMemMap,
            INVALID,
        );
        refused(
            cuda_ffi::mem_set_access(address, GRANULE, test.ordinal(), AccessFlags::ReadWrite),
            cuMemSetAccess,
            INVALID,
        );
        for ordinal in [-1, 1000] {
            refused(
                cuda_ffi::mem_set_access(address, 2 * GRANULE, ordinal, AccessFlags::ReadWrite),
                cuMemSetAccess,
                INVALID,
            );
        }
        refused(cuda_ffi::mem_unmap(address, GRANULE), cuMemUnmap, INVALID);
        refused(
            cuda_ffi::mem_address_free(address, 8 * GRANULE),
            cuMemAddressFree,
            INVALID,
        );
        cuda_ffi::mem_unmap(address, 2 * GRANULE).unwrap();
        cuda_ffi::mem_release(handle).unwrap();
        cuda_ffi::mem_address_free(address, 8 * GRANULE).unwrap();
    }
}

#[test]
fn granularities_are_the_devices() {
    let test = open();
    if !test.is_default() {
        return;
    }
    assert_eq!(
        cuda_ffi::get_minimum_granularity(test.ordinal()).unwrap(),
        test.core.granularity_bytes()
    );
    assert_eq!(
        cuda_ffi::get_recommended_granularity(test.ordinal()).unwrap(),
        test.core.recommended_granularity_bytes()
    );
    // The driver does not check that the device exists.
    for ordinal in [-1, 1000] {
        assert_eq!(
            cuda_ffi::get_minimum_granularity(ordinal).unwrap(),
            test.core.granularity_bytes()
        );
    }
}
