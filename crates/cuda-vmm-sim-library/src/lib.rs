//! A simulated driver as a shared library, to replace a real `libcuda.so.1` for other programs.
//!
//! `cargo build -p cuda-vmm-sim-library` makes `libcuda_vmm_sim_library.so` in the target folder.
//! It is a crate of its own, so that Rust programs that use `cuda-vmm-sim` do not export the
//! driver's symbols.
//!
//! The library has one simulator, made at the first call and configured by `CUDA_VMM_SIM_DEVICES`
//! and `CUDA_VMM_SIM_MEMORY_BYTES`. It lives until the process ends.
//!
//! It also exports two functions with which a test makes a call fail: [`cuda_vmm_sim_fail_call`]
//! and [`cuda_vmm_sim_end_faults`].
//!
//! # Safety
//! The functions have the contracts of the driver's functions of their names, and pass them on.

#![cfg(target_os = "linux")]
#![allow(non_snake_case)]

use cuda_vmm_sim::{Fault, SimConfig, Simulator};
use cuda_vmm_sys::*;
use std::ffi::{CStr, c_char, c_int, c_uchar, c_uint, c_ulonglong, c_void};
use std::ptr::null_mut;
use std::sync::OnceLock;

/// The process's simulator, which keeps its table valid.
struct Process {
    simulator: Simulator,
    table: DriverTable,
}

/// Returns the table, or the code that every call returns because there is no simulator.
fn table() -> Result<&'static DriverTable, CUresult> {
    process().map(|process| &process.table)
}

fn process() -> Result<&'static Process, CUresult> {
    static PROCESS: OnceLock<Result<Process, CUresult>> = OnceLock::new();
    let process = PROCESS.get_or_init(|| {
        let mut config = SimConfig::new();
        if let Some(devices) = variable("CUDA_VMM_SIM_DEVICES")? {
            config = config.devices(devices);
        }
        if let Some(bytes) = variable("CUDA_VMM_SIM_MEMORY_BYTES")? {
            config = config.memory_bytes(bytes);
        }
        let simulator = Simulator::new(config).map_err(|_| CUDA_ERROR_INVALID_VALUE)?;
        Ok(Process {
            table: simulator.table(),
            simulator,
        })
    });
    process.as_ref().map_err(|code| *code)
}

fn variable(name: &str) -> Result<Option<usize>, CUresult> {
    match std::env::var_os(name) {
        None => Ok(None),
        Some(value) => {
            let number = value.to_str().and_then(|value| value.trim().parse().ok());
            number.map(Some).ok_or(CUDA_ERROR_INVALID_VALUE)
        }
    }
}

macro_rules! define_exports {
    (
        required { $(fn $name:ident($($argument:ident: $type:ty),*) = $pfn:ident, $version:literal;)* }
        optional { $(fn $optional:ident($($optional_argument:ident: $optional_type:ty),*) = $optional_pfn:ident, $optional_version:literal;)* }
    ) => {
        $(export!($name($($argument: $type),*));)*
        $(export!($optional($($optional_argument: $optional_type),*));)*

        fn address(function: DriverFunction) -> *mut c_void {
            let address = match function {
                $(DriverFunction::$name => exports::$name as *const (),)*
                $(DriverFunction::$optional => exports::$optional as *const (),)*
            };
            address.cast_mut().cast()
        }
    };
}

/// Returns a function of the table. The optional one exists, because the simulated driver is new
/// enough.
macro_rules! function {
    ($table:ident.cuCtxRecordEvent) => {
        match $table.cuCtxRecordEvent {
            Some(function) => function,
            None => return CUDA_ERROR_NOT_SUPPORTED,
        }
    };
    ($table:ident.$name:ident) => {
        $table.$name
    };
}

/// Exports a function under the symbol that a real driver uses for this version of it.
macro_rules! export {
    (cuDeviceTotalMem $arguments:tt) => { export!(@as cuDeviceTotalMem_v2 = cuDeviceTotalMem $arguments); };
    (cuDevicePrimaryCtxRelease $arguments:tt) => { export!(@as cuDevicePrimaryCtxRelease_v2 = cuDevicePrimaryCtxRelease $arguments); };
    (cuMemGetInfo $arguments:tt) => { export!(@as cuMemGetInfo_v2 = cuMemGetInfo $arguments); };
    (cuMemAlloc $arguments:tt) => { export!(@as cuMemAlloc_v2 = cuMemAlloc $arguments); };
    (cuMemFree $arguments:tt) => { export!(@as cuMemFree_v2 = cuMemFree $arguments); };
    (cuMemHostRegister $arguments:tt) => { export!(@as cuMemHostRegister_v2 = cuMemHostRegister $arguments); };
    (cuMemcpyHtoD $arguments:tt) => { export!(@as cuMemcpyHtoD_v2 = cuMemcpyHtoD $arguments); };
    (cuMemcpyDtoH $arguments:tt) => { export!(@as cuMemcpyDtoH_v2 = cuMemcpyDtoH $arguments); };
    (cuMemcpyDtoD $arguments:tt) => { export!(@as cuMemcpyDtoD_v2 = cuMemcpyDtoD $arguments); };
    (cuMemcpyHtoDAsync $arguments:tt) => { export!(@as cuMemcpyHtoDAsync_v2 = cuMemcpyHtoDAsync $arguments); };
    (cuMemcpyDtoHAsync $arguments:tt) => { export!(@as cuMemcpyDtoHAsync_v2 = cuMemcpyDtoHAsync $arguments); };
    (cuMemcpyDtoDAsync $arguments:tt) => { export!(@as cuMemcpyDtoDAsync_v2 = cuMemcpyDtoDAsync $arguments); };
    (cuMemsetD8 $arguments:tt) => { export!(@as cuMemsetD8_v2 = cuMemsetD8 $arguments); };
    (cuStreamDestroy $arguments:tt) => { export!(@as cuStreamDestroy_v2 = cuStreamDestroy $arguments); };
    (cuStreamBeginCapture $arguments:tt) => { export!(@as cuStreamBeginCapture_v2 = cuStreamBeginCapture $arguments); };
    (cuEventDestroy $arguments:tt) => { export!(@as cuEventDestroy_v2 = cuEventDestroy $arguments); };
    (@as $symbol:ident = $name:ident($($argument:ident: $type:ty),*)) => {
        /// # Safety
        /// As the driver's function of this name.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $symbol($($argument: $type),*) -> CUresult {
            match table() {
                // SAFETY: the caller keeps the contract of the driver's function.
                Ok(table) => unsafe { (function!(table.$name))($($argument),*) },
                Err(code) => code,
            }
        }
    };
    ($name:ident $arguments:tt) => { export!(@as $name = $name $arguments); };
}

cuda_vmm_sys::driver_functions!(define_exports);

// Programs that are linked with CUDA 13's library use newer names of the same functions.
export!(@as cuDeviceGetUuid_v2 = cuDeviceGetUuid(uuid: *mut CUuuid, device: CUdevice));
export!(@as cuEventElapsedTime_v2 = cuEventElapsedTime(milliseconds: *mut f32, start: CUevent, end: CUevent));

/// Makes the `n`th call from now fail with `code`, once. The first is 1, and pure queries do not
/// count.
#[unsafe(no_mangle)]
pub extern "C" fn cuda_vmm_sim_fail_call(n: c_ulonglong, code: CUresult) -> CUresult {
    let simulator = match process() {
        Ok(process) => &process.simulator,
        Err(code) => return code,
    };
    simulator.start_trace();
    simulator.inject(Fault::nth_call(n, code));
    CUDA_SUCCESS
}

/// Removes the fault, and returns the number of calls since [`cuda_vmm_sim_fail_call`]. The planned
/// call has failed if that is at least its number.
#[unsafe(no_mangle)]
pub extern "C" fn cuda_vmm_sim_end_faults() -> c_ulonglong {
    let Ok(Process { simulator, .. }) = process() else {
        return 0;
    };
    simulator.clear_faults();
    simulator.take_trace().len() as c_ulonglong
}

/// The exported functions, by the table's names.
mod exports {
    pub(super) use super::cuDevicePrimaryCtxRelease_v2 as cuDevicePrimaryCtxRelease;
    pub(super) use super::cuDeviceTotalMem_v2 as cuDeviceTotalMem;
    pub(super) use super::cuEventDestroy_v2 as cuEventDestroy;
    pub(super) use super::cuMemAlloc_v2 as cuMemAlloc;
    pub(super) use super::cuMemFree_v2 as cuMemFree;
    pub(super) use super::cuMemGetInfo_v2 as cuMemGetInfo;
    pub(super) use super::cuMemHostRegister_v2 as cuMemHostRegister;
    pub(super) use super::cuMemcpyDtoD_v2 as cuMemcpyDtoD;
    pub(super) use super::cuMemcpyDtoDAsync_v2 as cuMemcpyDtoDAsync;
    pub(super) use super::cuMemcpyDtoH_v2 as cuMemcpyDtoH;
    pub(super) use super::cuMemcpyDtoHAsync_v2 as cuMemcpyDtoHAsync;
    pub(super) use super::cuMemcpyHtoD_v2 as cuMemcpyHtoD;
    pub(super) use super::cuMemcpyHtoDAsync_v2 as cuMemcpyHtoDAsync;
    pub(super) use super::cuMemsetD8_v2 as cuMemsetD8;
    pub(super) use super::cuStreamBeginCapture_v2 as cuStreamBeginCapture;
    pub(super) use super::cuStreamDestroy_v2 as cuStreamDestroy;
    pub(super) use super::*;
}

/// Finds a function by name, if its version here is not newer than the requested one.
fn find(symbol: &CStr, version: c_int) -> Option<*mut c_void> {
    match symbol.to_bytes() {
        b"cuGetProcAddress" if version >= 12000 => Some(cuGetProcAddress_v2 as *mut c_void),
        b"cuGetProcAddress" if version >= 11030 => Some(cuGetProcAddress as *mut c_void),
        name => {
            let mut functions = DriverFunction::ALL.iter();
            let function = functions.find(|function| function.c_name().to_bytes() == name)?;
            (function.version() <= version).then(|| address(*function))
        }
    }
}

/// `cuGetProcAddress` of CUDA 11.3. `flags` must select the default or the legacy stream.
///
/// # Safety
/// `symbol` is null or a C string, and `address` null or valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetProcAddress(
    symbol: *const c_char,
    address: *mut *mut c_void,
    version: c_int,
    flags: c_ulonglong,
) -> CUresult {
    if symbol.is_null() || address.is_null() || flags > 1 {
        return CUDA_ERROR_INVALID_VALUE;
    }
    // SAFETY: the caller's promise.
    let found = find(unsafe { CStr::from_ptr(symbol) }, version);
    // SAFETY: the caller's promise.
    unsafe { address.write(found.unwrap_or(null_mut())) };
    if found.is_some() {
        CUDA_SUCCESS
    } else {
        CUDA_ERROR_NOT_FOUND
    }
}

/// `cuGetProcAddress` of CUDA 12.0, which also writes a status to `status` unless that is null.
///
/// # Safety
/// As [`cuGetProcAddress`], and `status` is null or valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetProcAddress_v2(
    symbol: *const c_char,
    address: *mut *mut c_void,
    version: c_int,
    flags: c_ulonglong,
    status: *mut c_int,
) -> CUresult {
    const FOUND: c_int = 0;
    const SYMBOL_NOT_FOUND: c_int = 1;
    const VERSION_NOT_SUFFICIENT: c_int = 2;
    // SAFETY: the caller's promise.
    let code = unsafe { cuGetProcAddress(symbol, address, version, flags) };
    if !status.is_null() && matches!(code, CUDA_SUCCESS | CUDA_ERROR_NOT_FOUND) {
        // SAFETY: `symbol` is not null, otherwise the code were another, so it is a C string.
        let newer = find(unsafe { CStr::from_ptr(symbol) }, c_int::MAX).is_some();
        let result = match (code, newer) {
            (CUDA_SUCCESS, _) => FOUND,
            (_, true) => VERSION_NOT_SUFFICIENT,
            (_, false) => SYMBOL_NOT_FOUND,
        };
        // SAFETY: the caller's promise.
        unsafe { status.write(result) };
    }
    code
}
