//! Opening the driver library and filling the table from it.

use crate::{CUresult, DriverFunction, DriverTable};
use core::fmt;
use std::ffi::OsString;
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
    /// No driver library is at any of the places where one is looked for.
    #[error(
        "no CUDA driver library: {}; {DRIVER_PATH_VARIABLE} may name one",
        Attempts(attempts)
    )]
    NotFound {
        /// Each place in turn, with the dynamic loader's own words.
        attempts: Vec<(PathBuf, String)>,
    },
    /// `CUDA_VMM_DRIVER_PATH` is set and names no usable driver.
    #[error("{DRIVER_PATH_VARIABLE}: {reason}")]
    Variable {
        /// Why the library that it names cannot be used.
        #[source]
        reason: Box<LoadError>,
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

/// The places of [`LoadError::NotFound`] in one line.
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

/// Where [`load`] looks, in this order: a bare name is searched for by the dynamic loader, and the drivers of WSL 2 are in
/// a folder that it often does not search.
const PLACES: [&str; 2] = ["libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1"];

/// Opens the driver and fills a table: the library that `CUDA_VMM_DRIVER_PATH` names, or else `libcuda.so.1`, which the
/// dynamic loader searches for, or else that of WSL 2.
///
/// The library stays loaded until the process ends: a driver starts threads and must not be unloaded
/// under them, so the pointers in the table are valid for good. `cuInit` is not called.
///
/// This is safe because the environment is trusted, as the dynamic loader trusts `LD_LIBRARY_PATH` and `LD_PRELOAD`:
/// who sets them chooses the code that runs anyway.
///
/// # Errors
/// [`LoadError::NotFound`] with the places, if there is no library; [`LoadError::Variable`] if the variable is set and
/// names nothing usable; otherwise the symbol or entry point that is missing.
pub fn load() -> Result<DriverTable, LoadError> {
    load_named(std::env::var_os(DRIVER_PATH_VARIABLE))
}

fn load_named(named: Option<OsString>) -> Result<DriverTable, LoadError> {
    let Some(path) = named else {
        // SAFETY: these are the names of NVIDIA's driver, in places that the system's administrator controls.
        return unsafe { load_first(&PLACES.map(Path::new)) };
    };
    // SAFETY: whoever sets the variable vouches for what it names, as for `LD_PRELOAD`.
    unsafe { load_from(Path::new(&path)) }.map_err(|reason| match reason {
        LoadError::Unsupported => LoadError::Unsupported,
        reason => LoadError::Variable {
            reason: Box::new(reason),
        },
    })
}

/// The first of these libraries that is there.
///
/// # Safety
/// As for [`load_from`], of each.
unsafe fn load_first(places: &[&Path]) -> Result<DriverTable, LoadError> {
    let mut attempts = Vec::new();
    for place in places {
        // SAFETY: the caller's promise.
        match unsafe { load_from(place) } {
            Err(LoadError::LibraryMissing { path, reason }) => attempts.push((path, reason)),
            outcome => return outcome,
        }
    }
    Err(LoadError::NotFound { attempts })
}

/// As [`load`], from the library at `path`; a bare file name is searched for by the dynamic loader.
///
/// # Errors
/// [`LoadError`] names the library, symbol or entry point that is missing.
///
/// # Safety
/// The library's constructors run, and its symbol `cuGetProcAddress` is called. So it must be a CUDA driver, or keep a
/// driver's contracts: `cuGetProcAddress` is that function, and returns each function in the form of the version that it is
/// asked for.
#[cfg(target_os = "linux")]
pub unsafe fn load_from(path: &Path) -> Result<DriverTable, LoadError> {
    use crate::{CU_GET_PROC_ADDRESS_LEGACY_STREAM, CUDA_SUCCESS, PFN_cuGetProcAddress_v11030};
    use core::ffi::c_void;
    use core::ptr::{NonNull, null_mut};

    if path.as_os_str().is_empty() {
        // The dynamic loader takes this for the program itself.
        return Err(LoadError::LibraryMissing {
            path: path.to_owned(),
            reason: "the path is empty".to_owned(),
        });
    }
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
    // SAFETY: the caller promises a driver, whose symbol of this name is the four-argument form of CUDA 11.3, the type
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
///
/// # Safety
/// None here: nothing is loaded.
#[cfg(not(target_os = "linux"))]
pub unsafe fn load_from(_path: &Path) -> Result<DriverTable, LoadError> {
    Err(LoadError::Unsupported)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn every_place_is_asked_and_told() {
        let places = ["libcuda-of-nobody.so.1", "/nowhere/libcuda.so.1"].map(Path::new);
        // SAFETY: there are no such libraries.
        let error = unsafe { load_first(&places) }.expect_err("no such libraries");
        let LoadError::NotFound { attempts } = &error else {
            panic!("{error:?}");
        };
        for (place, (path, reason)) in places.iter().zip(attempts) {
            let name = place.to_str().expect("UTF-8");
            assert_eq!(path, place);
            assert!(reason.contains(name), "the loader's own words: {reason}");
            assert!(error.to_string().contains(name), "{error}");
        }
        assert_eq!(attempts.len(), 2);
        assert!(error.to_string().contains(DRIVER_PATH_VARIABLE), "{error}");
    }

    #[test]
    fn the_loader_is_asked_first_and_the_folder_of_wsl_then() {
        assert_eq!(PLACES[0], "libcuda.so.1");
        assert!(PLACES.contains(&"/usr/lib/wsl/lib/libcuda.so.1"));
    }

    #[test]
    fn a_library_that_is_no_driver_ends_the_search() {
        let places = ["libm.so.6", "/nowhere/libcuda.so.1"].map(Path::new);
        // SAFETY: loading the C library's mathematics has no effect, and it has no such symbol.
        let error = unsafe { load_first(&places) }.expect_err("no driver");
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
