//! Opening the driver library and filling the table from it.

use crate::{CUresult, DriverFunction, DriverTable};
use std::path::{Path, PathBuf};

/// The environment variable that names the driver library to open instead of `libcuda.so.1`.
pub const DRIVER_PATH_VARIABLE: &str = "CUDA_VMM_DRIVER_PATH";

/// Why a driver library could not be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The dynamic loader did not find or accept the library.
    #[error("the CUDA driver library {} could not be opened: {reason}", path.display())]
    LibraryMissing {
        /// The name or path that was asked for.
        path: PathBuf,
        /// The dynamic loader's own words.
        reason: String,
    },
    /// The library does not export a symbol that loading starts from.
    #[error("{} has no symbol {symbol}; the driver must be 11.4 or newer", path.display())]
    SymbolMissing {
        /// The library that was opened.
        path: PathBuf,
        /// The symbol that it lacks.
        symbol: &'static str,
    },
    /// `cuGetProcAddress` does not know a required entry point.
    #[error("{} has no {function} of CUDA version {}: code {code}", path.display(), function.version())]
    FunctionMissing {
        /// The library that was opened.
        path: PathBuf,
        /// The entry point that it lacks.
        function: DriverFunction,
        /// The `CUresult` of `cuGetProcAddress`, or 0 if it answered a null pointer.
        code: CUresult,
    },
    /// CUDA's virtual memory management is not available on this operating system.
    #[error("virtual memory management through the CUDA driver is supported on Linux only")]
    Unsupported,
}

/// Opens the driver named by `CUDA_VMM_DRIVER_PATH`, or else `libcuda.so.1`, and fills a table.
///
/// The library stays loaded until the process ends: a driver starts threads and must not be unloaded
/// under them, so the pointers in the table are valid for good. `cuInit` is not called.
///
/// # Errors
/// [`LoadError`] names the library, symbol or entry point that is missing.
pub fn load() -> Result<DriverTable, LoadError> {
    match std::env::var_os(DRIVER_PATH_VARIABLE) {
        Some(path) => load_from(Path::new(&path)),
        None => load_from(Path::new("libcuda.so.1")),
    }
}

/// As [`load`], from the library at `path`; a bare file name is searched for by the dynamic loader.
///
/// # Errors
/// [`LoadError`] names the library, symbol or entry point that is missing.
#[cfg(target_os = "linux")]
pub fn load_from(path: &Path) -> Result<DriverTable, LoadError> {
    use crate::{CU_GET_PROC_ADDRESS_LEGACY_STREAM, CUDA_SUCCESS, PFN_cuGetProcAddress_v11030};
    use core::ffi::c_void;
    use core::ptr::{NonNull, null_mut};

    // SAFETY: the caller names a CUDA driver; its constructors are those of a library that every
    // CUDA program loads and have no preconditions.
    let library =
        unsafe { libloading::Library::new(path) }.map_err(|error| LoadError::LibraryMissing {
            path: path.to_owned(),
            reason: error.to_string(),
        })?;
    const SYMBOL: &str = "cuGetProcAddress";
    let missing = || LoadError::SymbolMissing {
        path: path.to_owned(),
        symbol: SYMBOL,
    };
    // SAFETY: the symbol of this name is the four-argument form of CUDA 11.3, which is the type
    // given; later forms are exported under other names.
    let get_proc_address = unsafe { library.get::<PFN_cuGetProcAddress_v11030>(SYMBOL.as_bytes()) }
        .ok()
        .and_then(|symbol| *symbol)
        .ok_or_else(missing)?;
    // From here on the table's pointers lead into the library, so it is never closed.
    std::mem::forget(library);

    // SAFETY: `cuGetProcAddress` answers the named function in the form of the version asked for,
    // and the library that holds it stays loaded.
    unsafe {
        DriverTable::resolve_with(|function| {
            let mut address: *mut c_void = null_mut();
            let code = get_proc_address(
                function.c_name().as_ptr(),
                &mut address,
                function.version(),
                CU_GET_PROC_ADDRESS_LEGACY_STREAM as _,
            );
            match NonNull::new(address) {
                Some(address) if code == CUDA_SUCCESS => Ok(address),
                _ => Err(LoadError::FunctionMissing {
                    path: path.to_owned(),
                    function,
                    code,
                }),
            }
        })
    }
}

/// As [`load`]; on this operating system always an error.
///
/// # Errors
/// [`LoadError::Unsupported`].
#[cfg(not(target_os = "linux"))]
pub fn load_from(_path: &Path) -> Result<DriverTable, LoadError> {
    Err(LoadError::Unsupported)
}
