//! Makes sure that bindgen finds libclang.

use crate::places::WITHOUT;
use std::path::Path;

/// Sets `LIBCLANG_PATH` to the project's set-up folder if the machine has no libclang of its own.
pub fn find() -> Result<(), String> {
    for variable in ["LIBCLANG_PATH", "LLVM_CONFIG_PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let folders = crate::header::set_up_folders();
    let own = folders
        .iter()
        .map(|folder| folder.join("libclang"))
        .find(|folder| folder.join("libclang.so").is_file());
    if std::env::var_os("LIBCLANG_PATH").is_none()
        && let Some(own) = &own
    {
        // SAFETY: the build script has one thread, so no other thread reads the environment.
        unsafe { std::env::set_var("LIBCLANG_PATH", own) };
    }
    clang_sys::load().map_err(|reason| {
        let named = std::env::var_os("LIBCLANG_PATH").map_or_else(
            || "  LIBCLANG_PATH (not set)\n".to_owned(),
            |path| format!("  LIBCLANG_PATH={}\n", Path::new(&path).display()),
        );
        let set_up: String = folders
            .iter()
            .map(|folder| format!("  {}\n", folder.join("libclang").display()))
            .collect();
        format!(
            "cuda-vmm-sys needs libclang, version 9 or newer, to read cuda.h.\n\
             Looked in:\n{named}{set_up}  llvm-config, and the usual library folders\n\
             The search said: {reason}\n\
             To mend it, either\n  \
             - in a checkout of this project run `cargo xtask setup`, which brings it into its target folder and prints what \
             a program outside the checkout needs, or\n  \
             - install libclang (for example `apt-get install libclang-dev`), or\n  \
             - run `python3 -m pip install libclang` and set LIBCLANG_PATH to its `clang/native` folder, or\n  \
             - {WITHOUT}"
        )
    })
}
