//! What the machine already has of what a build needs.

use anyhow::{Result, bail};
use places::Found;
pub use places::cuda_version;
use std::path::Path;

#[path = "../../crates/cuda-vmm-sys/build/places.rs"]
mod places;

/// The machine's own libclang of version 9 or newer, found just as the build script will find it.
pub fn libclang() -> Result<Option<String>> {
    let found = match clang_sys::load() {
        Ok(()) => {
            let found = clang_sys::get_library().map(|library| {
                let recent = library
                    .version()
                    .is_some_and(|version| version >= clang_sys::Version::V9_0);
                (library.path().display().to_string(), recent)
            });
            // Nothing of it is used here, and unloading can only fail if it was never loaded.
            let _ = clang_sys::unload();
            found
        }
        Err(_) => None,
    };
    match (found, std::env::var_os("LIBCLANG_PATH")) {
        (Some((path, true)), _) => Ok(Some(path)),
        (_, Some(path)) => bail!(
            "LIBCLANG_PATH is {}, where no libclang of version 9 or newer is.\n\
             Unset it, or set it to the folder that holds libclang.so.",
            Path::new(&path).display()
        ),
        _ => Ok(None),
    }
}

/// The machine's own include folder with usable CUDA headers, and the variables that name none.
pub fn headers() -> Option<Found> {
    places::search(&places::places(|name| std::env::var_os(name), &[])).ok()
}
