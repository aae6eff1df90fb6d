//! Opens the driver library and fills the table from it.

use crate::{CUresult, DriverFunction, DriverTable};
use core::fmt;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The environment variable with the path of the driver library to open instead of `libcuda.so.1`.
pub const DRIVER_PATH_VARIABLE: &str = "CUDA_VMM_DRIVER_PATH";

/// Why a driver library cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The dynamic loader did not find or accept the library.
    #[error("the CUDA driver library {} could not be opened: {reason}", path.display())]
    LibraryMissing {
        /// The requested name or path.
        path: PathBuf,
        /// The dynamic loader's message.
        reason: String,
    },
    /// No driver library exists at any of the default paths.
    #[error(
        "no CUDA driver library: {}; {DRIVER_PATH_VARIABLE} may name one",
        Attempts(attempts)
    )]
    NotFound {
        /// Each path with the dynamic loader's message, in the order of the search.
        attempts: Vec<(PathBuf, String)>,
    },
    /// `CUDA_VMM_DRIVER_PATH` is set and names no usable driver.
    #[error("{DRIVER_PATH_VARIABLE}: {reason}")]
    Variable {
        /// Why that library cannot be used.
        #[source]
        reason: Box<LoadError>,
    },
    /// The library does not export a symbol that loading needs.
    #[error("{} has no symbol {symbol}; the driver must be 11.4 or newer", path.display())]
    SymbolMissing {
        /// The library that was opened.
        path: PathBuf,
        /// The missing symbol.
        symbol: &'static str,
    },
    /// `cuGetProcAddress` does not return a required entry point.
    #[error("{} has no {function} of CUDA version {}: code {code}", path.display(), function.version())]
    FunctionMissing {
        /// The library that was opened.
        path: PathBuf,
        /// The missing entry point.
        function: DriverFunction,
        /// The `CUresult` of `cuGetProcAddress`, or 0 if it returned a null pointer.
        code: CUresult,
    },
    /// CUDA's virtual memory management is not available on this operating system.
    #[error("virtual memory management through the CUDA driver is supported on Linux only")]
    Unsupported,
}

/// Formats the attempts of [`LoadError::NotFound`] in one line.
struct Attempts<'a>(&'a [(PathBuf, String)]);

impl fmt::Display for Attempts<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, (path, reason)) in self.0.iter().enumerate() {
            let separator = if number > 0 { ", " } else { "" };
            write!(formatter, "{separator}{} ({reason})", path.display())?;
        }
        Ok(())
    }
}

/// The paths that [`load`] tries, in this order. The dynamic loader searches for a bare name. WSL 2
/// has its driver in a folder that the loader often does not search.
const DEFAULT_PATHS: [&str; 2] = ["libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1"];

/// Opens the driver and fills a table.
///
/// It opens the library that `CUDA_VMM_DRIVER_PATH` names. If that is not set, it opens
/// `libcuda.so.1`, for which the dynamic loader searches, or else the one of WSL 2. It does not
/// call `cuInit`.
///
/// The library stays loaded until the process ends, because a driver starts threads and must not be
/// unloaded while they run. So the pointers in the table stay valid.
///
/// This function is safe because the environment is trusted, as the dynamic loader trusts
/// `LD_LIBRARY_PATH` and `LD_PRELOAD`: they too choose the code that runs.
///
/// # Errors
/// - [`LoadError::NotFound`] with the paths, if there is no library.
/// - [`LoadError::Variable`] if the variable is set and names no usable driver.
/// - [`LoadError::SymbolMissing`] or [`LoadError::FunctionMissing`] if the library lacks a
///   function.
/// - [`LoadError::Unsupported`] if the system is not Linux.
pub fn load() -> Result<DriverTable, LoadError> {
    load_named(std::env::var_os(DRIVER_PATH_VARIABLE))
}

fn load_named(named: Option<OsString>) -> Result<DriverTable, LoadError> {
    let Some(path) = named else {
        // SAFETY: these are the names of NVIDIA's driver, in folders that the system's
        // administrator controls.
        return unsafe { load_first(&DEFAULT_PATHS.map(Path::new)) };
    };
    // SAFETY: the environment is trusted to name a CUDA driver, as `LD_PRELOAD` is.
    unsafe { load_from(Path::new(&path)) }.map_err(|reason| match reason {
        LoadError::Unsupported => LoadError::Unsupported,
        reason => LoadError::Variable {
            reason: Box::new(reason),
        },
    })
}

/// Opens the first of these libraries that exists.
///
/// # Safety
/// As for [`load_from`], for each library.
unsafe fn load_first(paths: &[&Path]) -> Result<DriverTable, LoadError> {
    let mut attempts = Vec::new();
    for path in paths {
        // SAFETY: the caller's promise.
        match unsafe { load_from(path) } {
            Err(LoadError::LibraryMissing { path, reason }) => attempts.push((path, reason)),
            outcome => return outcome,
        }
    }
    Err(LoadError::NotFound { attempts })
}

/// As [`load`], from the library at `path`. The dynamic loader searches for a bare file name.
///
/// # Errors
/// [`LoadError`] names the library, symbol or entry point that is missing.
///
/// # Safety
/// The library's constructors run, and its symbol `cuGetProcAddress` is called. So the library must
/// be a CUDA driver, or keep a driver's contracts: `cuGetProcAddress` is that function, and returns
/// each function in the requested version.
#[cfg(target_os = "linux")]
pub unsafe fn load_from(path: &Path) -> Result<DriverTable, LoadError> {
    use crate::{CU_GET_PROC_ADDRESS_LEGACY_STREAM, CUDA_SUCCESS, PFN_cuGetProcAddress_v11030};
    use core::ffi::c_void;
    use core::ptr::{NonNull, null_mut};

    if path.as_os_str().is_empty() {
        // For an empty path the dynamic loader opens the program itself.
        return Err(LoadError::LibraryMissing {
            path: path.to_owned(),
            reason: "the path is empty".to_owned(),
        });
    }
    // SAFETY: the caller guarantees a CUDA driver. Every CUDA program loads that library, and its
    // constructors have no preconditions.
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
    // SAFETY: the caller guarantees a CUDA driver. Its symbol of this name is the function of CUDA
    // 11.3, which has this type; later versions have other names.
    let get_proc_address = unsafe { library.get::<PFN_cuGetProcAddress_v11030>(SYMBOL.as_bytes()) }
        .ok()
        .and_then(|symbol| *symbol)
        .ok_or_else(missing)?;
    // The table's pointers point into the library, so it is never closed.
    std::mem::forget(library);

    // SAFETY: `cuGetProcAddress` returns the named function in the requested version, and the
    // library stays loaded.
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

/// As [`load`]. On this operating system it always fails.
///
/// # Errors
/// [`LoadError::Unsupported`].
///
/// # Safety
/// None: nothing is loaded.
#[cfg(not(target_os = "linux"))]
pub unsafe fn load_from(_path: &Path) -> Result<DriverTable, LoadError> {
    Err(LoadError::Unsupported)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn every_place_is_asked_and_told() {
        let paths = ["libcuda-that-is-nowhere.so.1", "/nowhere/libcuda.so.1"].map(Path::new);
        // SAFETY: there are no such libraries.
        let error = unsafe { load_first(&paths) }.expect_err("no such libraries");
        let LoadError::NotFound { attempts } = &error else {
            panic!("{error:?}");
        };
        for (expected, (path, reason)) in paths.iter().zip(attempts) {
            let name = expected.to_str().expect("UTF-8");
            assert_eq!(expected, path);
            assert!(reason.contains(name), "the loader's own words: {reason}");
            assert!(error.to_string().contains(name), "{error}");
        }
        assert_eq!(attempts.len(), 2);
        assert!(error.to_string().contains(DRIVER_PATH_VARIABLE), "{error}");
    }

    #[test]
    fn the_loader_is_asked_first_and_the_folder_of_wsl_then() {
        assert_eq!(DEFAULT_PATHS[0], "libcuda.so.1");
        assert!(DEFAULT_PATHS.contains(&"/usr/lib/wsl/lib/libcuda.so.1"));
    }

    #[test]
    fn a_library_that_is_no_driver_ends_the_search() {
        let paths = ["libm.so.6", "/nowhere/libcuda.so.1"].map(Path::new);
        // SAFETY: loading the C library's mathematics has no effect, and it has no such symbol.
        let error = unsafe { load_first(&paths) }.expect_err("no driver");
        assert!(matches!(error, LoadError::SymbolMissing { .. }), "{error}");
    }

    #[test]
    fn what_the_variable_names_must_be_usable() {
        for named in ["", "/nowhere/libcuda.so.1", "libm.so.6"] {
            let error = load_named(Some(named.into())).expect_err("no driver");
            let LoadError::Variable { reason } = &error else {
                panic!("{error:?}");
            };
            let text = error.to_string();
            assert!(text.contains(DRIVER_PATH_VARIABLE), "{text}");
            assert!(text.contains(&reason.to_string()), "{text}");
        }
    }
}
