//! Brings what the machine lacks into the set-up folder.

use crate::pins::{self, Pin};
use crate::workspace::Workspace;
use crate::{files, machine, wheels};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// The wheel that holds `libclang.so`.
pub const LIBCLANG: &[&str] = &["libclang==18.1.1"];
/// The wheel that holds `cuda.h`.
pub const RUNTIME: &[&str] = &["nvidia-cuda-runtime==13.0.96"];
/// The wheels that together make a CUDA compiler, headers included.
pub const TOOLKIT: &[&str] = &[
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-cccl==13.0.85",
];

/// The file in a finished folder that says which wheels it was made from.
const STAMP: &str = ".pins";

/// The pinned CUDA toolkit that `setup --cuda` makes.
pub fn toolkit_folder(workspace: &Workspace) -> PathBuf {
    workspace.setup_folder().join("cuda")
}

/// Makes sure that a build will find libclang and `cuda.h`, and with `cuda` a CUDA compiler.
///
/// Says on standard error what it uses if `tell`, and what it brings always.
pub fn ensure(workspace: &Workspace, cuda: bool, tell: bool) -> Result<()> {
    let setup = workspace.setup_folder();
    let say = |line: String| {
        if tell {
            eprintln!("xtask: {line}");
        }
    };
    let _lock = lock(&setup)?;

    let libclang = setup.join("libclang");
    let pins = pins::select(LIBCLANG)?;
    if is_made_from(&libclang, &pins) {
        say(format!("libclang: {}", workspace.short(&libclang)));
    } else if let Some(path) = machine::libclang()? {
        say(format!("libclang: {path}, the machine's own"));
    } else {
        make(&setup, &libclang, &pins, |unpacked, stage| {
            let library = wheels::libclang(unpacked)?;
            fs::rename(&library, stage.join("libclang.so"))
                .with_context(|| format!("moving {}", library.display()))
        })?;
        say(format!("libclang: {}", workspace.short(&libclang)));
    }

    let toolkit = toolkit_folder(workspace);
    let full = pins::select(TOOLKIT)?;
    let headers = pins::select(RUNTIME)?;
    if is_made_from(&toolkit, &full) || (!cuda && is_made_from(&toolkit, &headers)) {
        say(format!("CUDA: {}", workspace.short(&toolkit)));
    } else if let Some(found) = machine::headers().filter(|_| !cuda) {
        for wrong in found.wrong {
            eprintln!("xtask: warning: {wrong}");
        }
        say(format!(
            "cuda.h: {}, the machine's own",
            found.include.display()
        ));
    } else {
        make_toolkit(&setup, &toolkit, if cuda { &full } else { &headers })?;
        say(format!("CUDA: {}", workspace.short(&toolkit)));
    }
    Ok(())
}

/// The include folder of another version's headers, brought if it is not there.
pub fn ensure_headers(workspace: &Workspace, version: &str, key: &str) -> Result<PathBuf> {
    let setup = workspace.setup_folder();
    let _lock = lock(&setup)?;
    let folder = setup.join("headers").join(version);
    let pins = pins::select(&[key])?;
    if !is_made_from(&folder, &pins) {
        make_toolkit(&setup, &folder, &pins)?;
    }
    Ok(folder)
}

/// What a program outside the checkout puts into its `.cargo/config.toml` to be built with what the set-up folder holds;
/// nothing if the machine has all of its own.
pub fn configuration(setup: &Path) -> String {
    let mut lines = String::new();
    for (variable, folder, file) in [
        ("CUDA_HOME", "cuda", "include/cuda.h"),
        ("LIBCLANG_PATH", "libclang", "libclang.so"),
    ] {
        let folder = setup.join(folder);
        if folder.join(file).is_file() {
            let path = folder.display().to_string();
            let path = path.replace('\\', "\\\\").replace('"', "\\\"");
            lines += &format!("{variable} = \"{path}\"\n");
        }
    }
    match lines.is_empty() {
        true => lines,
        false => format!("[env]\n{lines}"),
    }
}

/// Keeps a second xtask out while one changes the set-up folder; freed when dropped.
fn lock(setup: &Path) -> Result<fs::File> {
    files::make(setup)?;
    let path = setup.join(".lock");
    let file = fs::File::create(&path).with_context(|| format!("making {}", path.display()))?;
    file.lock()
        .with_context(|| format!("locking {}", path.display()))?;
    Ok(file)
}

fn is_made_from(folder: &Path, pins: &[Pin]) -> bool {
    fs::read_to_string(folder.join(STAMP)).is_ok_and(|stamp| stamp == pins::stamp(pins))
}

fn make_toolkit(setup: &Path, folder: &Path, pins: &[Pin]) -> Result<()> {
    make(setup, folder, pins, |unpacked, stage| {
        for root in wheels::toolkit_roots(unpacked)? {
            files::merge_into(&root, stage)?;
        }
        files::make_executable(&stage.join("bin"))?;
        files::make_executable(&stage.join("nvvm/bin"))
    })
}

/// Makes `folder` from `pins` beside its final place, and moves it there only when it is whole.
fn make(
    setup: &Path,
    folder: &Path,
    pins: &[Pin],
    mut take: impl FnMut(&Path, &Path) -> Result<()>,
) -> Result<()> {
    wheels::check_pip()?;
    let work = setup.join(".partial");
    files::remove_tree(&work)?;
    let stage = work.join("stage");
    files::make(&stage)?;
    for pin in pins {
        let unpacked = wheels::bring(pin, &work)?;
        take(&unpacked, &stage)?;
    }
    files::keep_times(folder, &stage)?;
    fs::write(stage.join(STAMP), pins::stamp(pins)).context("writing the stamp")?;
    files::remove_tree(folder)?;
    if let Some(parent) = folder.parent() {
        files::make(parent)?;
    }
    fs::rename(&stage, folder).with_context(|| format!("moving to {}", folder.display()))?;
    files::remove_tree(&work)
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn the_configuration_names_what_the_set_up_folder_holds() {
        let base = tempfile::tempdir().unwrap();
        let setup = base.path().join("a \"b\"");
        assert_eq!(configuration(&setup), "");

        files::make(&setup.join("cuda/include")).unwrap();
        fs::write(setup.join("cuda/include/cuda.h"), "").unwrap();
        let escaped = format!("{}/a \\\"b\\\"", base.path().display());
        let cuda = format!("[env]\nCUDA_HOME = \"{escaped}/cuda\"\n");
        assert_eq!(configuration(&setup), cuda);

        files::make(&setup.join("libclang")).unwrap();
        fs::write(setup.join("libclang/libclang.so"), "").unwrap();
        let both = format!("{cuda}LIBCLANG_PATH = \"{escaped}/libclang\"\n");
        assert_eq!(configuration(&setup), both);
    }
}
