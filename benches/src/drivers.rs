//! Drivers of our own: one whose calls do nothing, so that this project's own work is measured, and
//! one in front of another that notes a thread's calls. Nothing is timed through that one.
//!
//! # Safety
//! A function that notes passes its arguments on to the driver's function of the same name,
//! unchanged, so the contract that its caller keeps is that function's own. One that does nothing
//! touches no memory, except the places of the few that return values.

use anyhow::{Result, ensure};
use core::ffi::{c_char, c_int, c_uchar, c_uint, c_ulonglong, c_void};
use cuda_vmm::sys::*;
use cuda_vmm::{Driver, DriverKind};
use std::cell::RefCell;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// The granularity in bytes of the driver that does nothing.
pub const GRANULARITY: usize = 2 << 20;

/// A noted call of the driver, and how many bytes it mapped if it was `cuMemMap`.
pub type Call = (DriverFunction, usize);

/// The functions that reserve, make, map, or give back memory or addresses.
pub const MEMORY_MANAGEMENT: [DriverFunction; 7] = [
    DriverFunction::cuMemAddressReserve,
    DriverFunction::cuMemAddressFree,
    DriverFunction::cuMemCreate,
    DriverFunction::cuMemRelease,
    DriverFunction::cuMemMap,
    DriverFunction::cuMemUnmap,
    DriverFunction::cuMemSetAccess,
];

pub fn count_of(calls: &[Call], functions: &[DriverFunction]) -> usize {
    let is_one = |call: &&Call| functions.contains(&call.0);
    calls.iter().filter(is_one).count()
}

static BEHIND: OnceLock<DriverTable> = OnceLock::new();

thread_local! {
    /// The thread's calls so far, while they are noted.
    static CALLS: RefCell<Option<Vec<Call>>> = const { RefCell::new(None) };
}

fn note(call: Call, make: impl FnOnce(&DriverTable) -> Option<CUresult>) -> CUresult {
    // A thread that ends notes nothing.
    let _ = CALLS.try_with(|calls| {
        if let Some(calls) = &mut *calls.borrow_mut() {
            calls.push(call);
        }
    });
    let code = BEHIND.get().and_then(make);
    code.unwrap_or(CUDA_ERROR_NOT_INITIALIZED)
}

macro_rules! mapped_bytes {
    (cuMemMap $address:ident $bytes:ident $($other:ident)*) => {
        $bytes
    };
    ($function:ident $($argument:ident)*) => {
        0
    };
}

/// A function that notes its calls and makes them `$behind`, or else does nothing.
macro_rules! define_function {
    ($name:ident($($argument:ident: $type:ty),*), $behind:expr) => {
        #[allow(non_snake_case)]
        unsafe extern "C" fn $name<const NOTES: bool>($($argument: $type),*) -> CUresult {
            if !NOTES {
                return CUDA_SUCCESS;
            }
            note((DriverFunction::$name, mapped_bytes!($name $($argument)*)), |table| {
                let behind: fn(&DriverTable) -> Option<_> = $behind;
                // SAFETY: the caller keeps the contract of the function of this name.
                behind(table).map(|function| unsafe { function($($argument),*) })
            })
        }
    };
}

macro_rules! define_table {
    (
        required { $(fn $name:ident($($argument:ident: $type:ty),*) = $pfn:ident, $version:literal;)* }
        optional { $(fn $optional:ident($($optional_argument:ident: $optional_type:ty),*) = $optional_pfn:ident, $optional_version:literal;)* }
    ) => {
        /// Functions that note their calls, or else return success and do nothing.
        fn table<const NOTES: bool>(has_optional: bool) -> DriverTable {
            $(define_function!($name($($argument: $type),*), |table| Some(table.$name));)*
            $(define_function!(
                $optional($($optional_argument: $optional_type),*), |table| table.$optional
            );)*
            DriverTable {
                $($name: $name::<NOTES>,)*
                $($optional: has_optional.then_some($optional::<NOTES> as _),)*
            }
        }
    };
}
driver_functions!(define_table);

/// Opens the one driver that notes calls, in front of `driver`, which must stay open as long.
pub fn noting_driver(driver: &Driver) -> Result<Driver> {
    let behind = driver.table();
    ensure!(BEHIND.set(*behind).is_ok(), "calls are noted already");
    let table = table::<true>(behind.cuCtxRecordEvent.is_some());
    // SAFETY: the functions are static; those behind them stay as long as the caller's driver.
    Ok(unsafe { Driver::from_table(table, driver.kind()) }?)
}

/// Notes this thread's calls while something is done.
pub fn noted_calls<T>(act: impl FnOnce() -> T) -> (T, Vec<Call>) {
    CALLS.set(Some(Vec::new()));
    let outcome = act();
    (outcome, CALLS.take().unwrap_or_default())
}

/// A driver whose functions do nothing, but some write one value to their first argument.
macro_rules! define_no_op_table {
    ($($name:ident($written:ty $(, $given:ident: $type:ty)*) = $value:expr;)*) => {
        #[allow(non_snake_case)]
        fn no_op_table() -> DriverTable {
            $(
                unsafe extern "C" fn $name(place: *mut $written $(, $given: $type)*) -> CUresult {
                    let value: $written = $value;
                    // SAFETY: the caller passes a valid place, as CUDA's contract asks.
                    unsafe { *place = value };
                    CUDA_SUCCESS
                }
            )*
            DriverTable { $($name,)* ..table::<false>(true) }
        }
    };
}
define_no_op_table! {
    cuDriverGetVersion(c_int) = 13000;
    cuDeviceGetCount(c_int) = 1;
    cuDeviceGetAttribute(c_int, _which: CUdevice_attribute, _of: CUdevice) = 1;
    cuDeviceTotalMem(usize, _of: CUdevice) = 1 << 40;
    cuMemGetAllocationGranularity(
        usize, _of: *const CUmemAllocationProp, _which: CUmemAllocationGranularity_flags
    ) = GRANULARITY;
    cuMemAddressReserve(
        CUdeviceptr, bytes: usize, alignment: usize, _wanted: CUdeviceptr, _flags: c_ulonglong
    ) = {
        let room = bytes.next_multiple_of(alignment) as u64;
        let free = NEXT.fetch_add(room, Ordering::Relaxed);
        free.next_multiple_of(alignment as u64)
    };
    cuMemCreate(
        CUmemGenericAllocationHandle,
        _bytes: usize, _of: *const CUmemAllocationProp, _flags: c_ulonglong
    ) = NEXT.fetch_add(1, Ordering::Relaxed);
}

/// The next free address, and the next handle.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// A driver of one device with 1 TiB, whose calls do nothing. Work is over at once, or never.
pub fn no_op_driver(work_ends: bool) -> Driver {
    unsafe extern "C" fn is_not_over(_event: CUevent) -> CUresult {
        CUDA_ERROR_NOT_READY
    }
    let mut table = no_op_table();
    if !work_ends {
        table.cuEventQuery = is_not_over;
    }
    // SAFETY: the functions are static and write only the values above; nothing touches memory.
    unsafe { Driver::from_table(table, DriverKind::Simulated) }.expect("no call fails")
}
