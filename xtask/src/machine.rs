//! What the machine already has of what a build needs.

use anyhow::{Result, bail};
use places::{BELOW, OLDEST, USUAL, VARIABLES};
use std::path::{Path, PathBuf};

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

/// The machine's own include folder with usable CUDA headers.
pub fn headers() -> Option<PathBuf> {
    let mut roots: Vec<PathBuf> = VARIABLES
        .iter()
        .filter_map(std::env::var_os)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
        .collect();
    if let Some(environment) = std::env::var_os("VIRTUAL_ENV") {
        let libraries = Path::new(&environment).join("lib");
        for entry in libraries.read_dir().into_iter().flatten().flatten() {
            roots.push(entry.path().join("site-packages"));
        }
    }
    roots.extend(USUAL.map(PathBuf::from));
    roots
        .iter()
        .flat_map(|root| BELOW.map(|below| root.join(below)))
        .find(|include| {
            include.join("cudaTypedefs.h").is_file()
                && cuda_version(include).is_some_and(|version| version >= OLDEST)
        })
}

/// `CUDA_VERSION` of the `cuda.h` in `include`, such as 13000 for CUDA 13.0.
pub fn cuda_version(include: &Path) -> Option<u32> {
    let text = std::fs::read(include.join("cuda.h")).ok()?;
    String::from_utf8_lossy(&text)
        .lines()
        .find_map(|line| line.trim().strip_prefix("#define CUDA_VERSION "))
        .and_then(|version| version.trim().parse().ok())
}
