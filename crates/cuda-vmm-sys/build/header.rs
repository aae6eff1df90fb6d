//! Finds the folder with `cuda.h` and `cudaTypedefs.h`.

use crate::places::{self, ENVIRONMENTS, VARIABLES};
use std::path::PathBuf;

/// Returns the include folder, or a message with the searched folders and what to do.
pub fn find() -> Result<PathBuf, String> {
    for variable in VARIABLES.iter().chain(&ENVIRONMENTS) {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let places = places::places(|name| std::env::var_os(name), &set_up_folders());
    let found = places::search(&places)?;
    for wrong in found.wrong {
        println!(
            "cargo::warning={wrong}; the headers in {} are used instead",
            found.include.display()
        );
    }
    println!(
        "cargo::rerun-if-changed={}",
        found.include.join("cuda.h").display()
    );
    Ok(found.include)
}

/// Returns the project's set-up folders, which are in a parent of the output folder.
pub fn set_up_folders() -> Vec<PathBuf> {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default());
    out.ancestors()
        .map(|folder| folder.join("cuda-vmm-setup"))
        .filter(|folder| folder.is_dir())
        .collect()
}
