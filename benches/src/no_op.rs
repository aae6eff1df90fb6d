//! A driver whose calls do nothing, so that what is measured is this project's own work.

use core::ffi::{c_char, c_int, c_uchar, c_uint, c_ulonglong, c_void};
use cuda_vmm::sys::*;
use cuda_vmm::{Driver, DriverKind};
use std::sync::atomic::{AtomicU64, Ordering};

/// The granularity that the driver reports, in bytes.
pub const GRANULARITY: usize = 2 << 20;

macro_rules! define_table {
    (
        required { $(fn $name:ident($($argument:ident: $type:ty),*) = $pfn:ident, $version:literal;)* }
        optional { $(fn $optional:ident($($optional_argument:ident: $optional_type:ty),*) = $optional_pfn:ident, $optional_version:literal;)* }
    ) => {
        /// Every call answers success and does nothing.
        fn table() -> DriverTable {
            $(
                #[allow(non_snake_case)]
                unsafe extern "C" fn $name($(_: $type),*) -> CUresult {
                    CUDA_SUCCESS
                }
            )*
            $(
                #[allow(non_snake_case)]
                unsafe extern "C" fn $optional($(_: $optional_type),*) -> CUresult {
                    CUDA_SUCCESS
                }
            )*
            DriverTable { $($name,)* $($optional: Some($optional),)* }
        }
    };
}
cuda_vmm::sys::driver_functions!(define_table);

unsafe extern "C" fn version(version: *mut c_int) -> CUresult {
    // SAFETY: the caller passes a valid place, as CUDA's contract asks.
    unsafe { *version = 13000 };
    CUDA_SUCCESS
}

unsafe extern "C" fn one(count: *mut c_int) -> CUresult {
    // SAFETY: as above.
    unsafe { *count = 1 };
    CUDA_SUCCESS
}

unsafe extern "C" fn attribute(value: *mut c_int, _: CUdevice_attribute, _: CUdevice) -> CUresult {
    // SAFETY: as above.
    unsafe { one(value) }
}

unsafe extern "C" fn total(bytes: *mut usize, _: CUdevice) -> CUresult {
    // SAFETY: as above.
    unsafe { *bytes = 1 << 40 };
    CUDA_SUCCESS
}

unsafe extern "C" fn granularity(
    bytes: *mut usize,
    _: *const CUmemAllocationProp,
    _: CUmemAllocationGranularity_flags,
) -> CUresult {
    // SAFETY: as above.
    unsafe { *bytes = GRANULARITY };
    CUDA_SUCCESS
}

static NEXT: AtomicU64 = AtomicU64::new(1);

unsafe extern "C" fn reserve(
    address: *mut CUdeviceptr,
    bytes: usize,
    alignment: usize,
    _: CUdeviceptr,
    _: c_ulonglong,
) -> CUresult {
    let room = bytes.next_multiple_of(alignment) as u64;
    // SAFETY: as above.
    unsafe {
        *address = NEXT
            .fetch_add(room, Ordering::Relaxed)
            .next_multiple_of(alignment as u64)
    };
    CUDA_SUCCESS
}

unsafe extern "C" fn create(
    handle: *mut CUmemGenericAllocationHandle,
    _: usize,
    _: *const CUmemAllocationProp,
    _: c_ulonglong,
) -> CUresult {
    // SAFETY: as above.
    unsafe { *handle = NEXT.fetch_add(1, Ordering::Relaxed) };
    CUDA_SUCCESS
}

/// A driver of one device with 1 TiB, whose calls answer success and do nothing.
pub fn no_op_driver() -> Driver {
    let table = DriverTable {
        cuDriverGetVersion: version,
        cuDeviceGetCount: one,
        cuDeviceGetAttribute: attribute,
        cuDeviceTotalMem: total,
        cuMemGetAllocationGranularity: granularity,
        cuMemAddressReserve: reserve,
        cuMemCreate: create,
        ..table()
    };
    // SAFETY: the functions are static and write nothing but the answers above; no memory is behind the
    // addresses, and nothing here touches any.
    unsafe { Driver::from_table(table, DriverKind::Simulated) }.expect("no call fails")
}
