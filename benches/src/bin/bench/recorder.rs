//! A driver in front of the driver that notes the calls of a thread. It takes time, so nothing is
//! timed through it.
//!
//! # Safety
//! Every function passes its arguments on to the driver's function of the same name, unchanged, so
//! the contract that its caller keeps is that function's own.

use anyhow::{Result, ensure};
use core::ffi::{c_char, c_int, c_uchar, c_uint, c_ulonglong, c_void};
use cuda_vmm::Driver;
use cuda_vmm::sys::*;
use std::cell::RefCell;
use std::sync::OnceLock;

/// A call of the driver.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// What was called.
    pub function: DriverFunction,
    /// What was mapped, in bytes, if it was `cuMemMap`.
    pub bytes: usize,
}

impl Call {
    /// Whether it reserves, makes, maps, or gives back memory or addresses.
    pub fn is_memory_management(&self) -> bool {
        matches!(
            self.function,
            DriverFunction::cuMemAddressReserve
                | DriverFunction::cuMemAddressFree
                | DriverFunction::cuMemCreate
                | DriverFunction::cuMemRelease
                | DriverFunction::cuMemMap
                | DriverFunction::cuMemUnmap
                | DriverFunction::cuMemSetAccess
        )
    }
}

/// The driver behind.
static BEHIND: OnceLock<DriverTable> = OnceLock::new();

thread_local! {
    /// The thread's calls so far, while they are noted.
    static CALLS: RefCell<Option<Vec<Call>>> = const { RefCell::new(None) };
}

fn note(function: DriverFunction, bytes: usize) {
    // A thread that ends notes nothing.
    let _ = CALLS.try_with(|calls| {
        if let Some(calls) = &mut *calls.borrow_mut() {
            calls.push(Call { function, bytes });
        }
    });
}

macro_rules! define_table {
    (
        required { $(fn $name:ident($($argument:ident: $type:ty),*) = $pfn:ident, $version:literal;)* }
        optional { $(fn $optional:ident($($optional_argument:ident: $optional_type:ty),*) = $optional_pfn:ident, $optional_version:literal;)* }
    ) => {
        fn table(behind: &DriverTable) -> DriverTable {
            $(
                #[allow(non_snake_case)]
                unsafe extern "C" fn $name($($argument: $type),*) -> CUresult {
                    note(DriverFunction::$name, 0);
                    match BEHIND.get() {
                        // SAFETY: the caller keeps the contract of the function of this name.
                        Some(behind) => unsafe { (behind.$name)($($argument),*) },
                        None => CUDA_ERROR_NOT_INITIALIZED,
                    }
                }
            )*
            $(
                #[allow(non_snake_case)]
                unsafe extern "C" fn $optional($($optional_argument: $optional_type),*) -> CUresult {
                    note(DriverFunction::$optional, 0);
                    match BEHIND.get().and_then(|behind| behind.$optional) {
                        // SAFETY: the caller keeps the contract of the function of this name.
                        Some(function) => unsafe { function($($optional_argument),*) },
                        None => CUDA_ERROR_NOT_INITIALIZED,
                    }
                }
            )*
            DriverTable { $($name,)* $($optional: behind.$optional.map(|_| $optional as _),)* }
        }
    };
}
driver_functions!(define_table);

unsafe extern "C" fn map(
    address: CUdeviceptr,
    bytes: usize,
    offset: usize,
    handle: CUmemGenericAllocationHandle,
    flags: c_ulonglong,
) -> CUresult {
    note(DriverFunction::cuMemMap, bytes);
    match BEHIND.get() {
        // SAFETY: the caller keeps the contract of `cuMemMap`.
        Some(behind) => unsafe { (behind.cuMemMap)(address, bytes, offset, handle, flags) },
        None => CUDA_ERROR_NOT_INITIALIZED,
    }
}

/// Opens the driver in front of `driver`, of which there can be only one.
pub fn open(driver: &Driver) -> Result<Driver> {
    let behind = driver.table();
    ensure!(BEHIND.set(*behind).is_ok(), "calls are recorded already");
    let table = DriverTable {
        cuMemMap: map,
        ..table(behind)
    };
    // SAFETY: the functions are static; those behind them stay as long as the caller's driver,
    // which the machine keeps until the program ends.
    Ok(unsafe { Driver::from_table(table, driver.kind()) }?)
}

/// Notes this thread's calls while something is done.
pub fn record<T>(act: impl FnOnce() -> T) -> (T, Vec<Call>) {
    CALLS.set(Some(Vec::new()));
    let outcome = act();
    (outcome, CALLS.take().unwrap_or_default())
}
