//! Finds the folder that holds `cuda.h` and `cudaTypedefs.h`.

use crate::places::{BELOW, OLDEST, USUAL, VARIABLES};
use std::path::{Path, PathBuf};

/// The include folder, or a message that says where it was sought and what to do.
pub fn find() -> Result<PathBuf, String> {
    let mut roots = Vec::new();
    for variable in VARIABLES {
        println!("cargo::rerun-if-env-changed={variable}");
        if let Some(value) = std::env::var_os(variable).filter(|value| !value.is_empty()) {
            roots.push((format!("{variable}="), PathBuf::from(value)));
        }
    }
    for folder in set_up_folders() {
        roots.push((String::new(), folder.join("cuda")));
    }
    println!("cargo::rerun-if-env-changed=VIRTUAL_ENV");
    if let Some(environment) = std::env::var_os("VIRTUAL_ENV") {
        let libraries = Path::new(&environment).join("lib");
        for entry in libraries.read_dir().into_iter().flatten().flatten() {
            roots.push((String::new(), entry.path().join("site-packages")));
        }
    }
    roots.extend(USUAL.map(|folder| (String::new(), PathBuf::from(folder))));

    let mut looked = String::new();
    for (origin, root) in &roots {
        for below in BELOW {
            let include = root.join(below);
            if !include.join("cuda.h").is_file() {
                continue;
            }
            match usable(&include) {
                Ok(()) => {
                    println!(
                        "cargo::rerun-if-changed={}",
                        include.join("cuda.h").display()
                    );
                    return Ok(include);
                }
                Err(reason) => looked += &format!("  {} ({reason})\n", include.display()),
            }
        }
        looked += &format!("  {origin}{}\n", root.display());
    }
    Err(format!(
        "cuda-vmm-sys needs the CUDA headers cuda.h and cudaTypedefs.h, of CUDA 11.4 or newer.\n\
         Looked in and below:\n{looked}\
         To mend it, either\n  \
         - in a checkout of this project run `cargo xtask setup`, which brings them into its target folder; a program \
         outside the checkout then needs CUDA_HOME=CHECKOUT/target/cuda-vmm-setup/cuda and \
         LIBCLANG_PATH=CHECKOUT/target/cuda-vmm-setup/libclang, or\n  \
         - install the CUDA toolkit and set CUDA_HOME to its folder, or\n  \
         - run `python3 -m pip install nvidia-cuda-runtime` and set CUDA_HOME to the `nvidia/cu13` folder it made."
    ))
}

/// The project's own set-up folder, wherever the target folder is: a parent of our output folder.
pub fn set_up_folders() -> Vec<PathBuf> {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default());
    out.ancestors()
        .map(|folder| folder.join("cuda-vmm-setup"))
        .filter(|folder| folder.is_dir())
        .collect()
}

/// Whether the header beside `cuda.h` is there too, and new enough.
fn usable(include: &Path) -> Result<(), String> {
    if !include.join("cudaTypedefs.h").is_file() {
        return Err("cuda.h without cudaTypedefs.h".into());
    }
    let text = std::fs::read(include.join("cuda.h")).map_err(|error| error.to_string())?;
    let version = String::from_utf8_lossy(&text)
        .lines()
        .find_map(|line| line.trim().strip_prefix("#define CUDA_VERSION "))
        .and_then(|version| version.trim().parse::<u32>().ok());
    match version {
        Some(version) if version >= OLDEST => Ok(()),
        Some(version) => Err(format!("CUDA_VERSION {version}, older than {OLDEST}")),
        None => Err("no CUDA_VERSION in it".into()),
    }
}
