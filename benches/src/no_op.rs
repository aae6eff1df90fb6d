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
        /// Every call returns success and does nothing.
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

/// Functions that write one value to their first argument.
macro_rules! define_values {
    ($($name:ident($written:ty $(, $ignored:ty)*) = $value:expr;)*) => {$(
        unsafe extern "C" fn $name(place: *mut $written $(, _: $ignored)*) -> CUresult {
            // SAFETY: the caller passes a valid place, as CUDA's contract asks.
            unsafe { *place = $value };
            CUDA_SUCCESS
        }
    )*};
}
define_values! {
    version(c_int) = 13000;
    count(c_int) = 1;
    attribute(c_int, CUdevice_attribute, CUdevice) = 1;
    total(usize, CUdevice) = 1 << 40;
    granularity(usize, *const CUmemAllocationProp, CUmemAllocationGranularity_flags) = GRANULARITY;
    create(CUmemGenericAllocationHandle, usize, *const CUmemAllocationProp, c_ulonglong) =
        NEXT.fetch_add(1, Ordering::Relaxed);
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
    // SAFETY: the caller passes a valid place, as CUDA's contract asks.
    unsafe {
        *address = NEXT
            .fetch_add(room, Ordering::Relaxed)
            .next_multiple_of(alignment as u64)
    };
    CUDA_SUCCESS
}

/// A driver of one device with 1 TiB, whose calls return success and do nothing.
pub fn no_op_driver() -> Driver {
    let table = DriverTable {
        cuDriverGetVersion: version,
        cuDeviceGetCount: count,
        cuDeviceGetAttribute: attribute,
        cuDeviceTotalMem: total,
        cuMemGetAllocationGranularity: granularity,
        cuMemAddressReserve: reserve,
        cuMemCreate: create,
        ..table()
    };
    // SAFETY: the functions are static and write nothing except the values above; no memory is
    // behind the addresses, and nothing here touches any.
    unsafe { Driver::from_table(table, DriverKind::Simulated) }.expect("no call fails")
}
