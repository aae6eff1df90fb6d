//! Brings what the machine lacks into the set-up folder, as wheels, with the machine's own pip.

use crate::files;
use crate::workspace::Workspace;
use anyhow::{Context, Result, bail};
use fs_err as fs;
use places::Found;
pub use places::cuda_version;
use std::path::{Path, PathBuf};
use xshell::cmd;

#[path = "../../crates/cuda-vmm-sys/build/places.rs"]
mod places;

/// Every wheel that may be brought, by exact version and hash, in pip's requirements format.
const PINS: &str = include_str!("../pins.txt");
/// The wheel that holds `libclang.so`.
const LIBCLANG: &[&str] = &["libclang==18.1.1"];
/// The wheel that holds `cuda.h`.
const RUNTIME: &[&str] = &["nvidia-cuda-runtime==13.0.96"];
/// The wheels that together make a CUDA compiler, headers included.
const TOOLKIT: &[&str] = &[
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-cccl==13.0.85",
];

/// Where unpacked wheels hold what is wanted of them.
const IN_LIBCLANG: &str = "clang/native";
const IN_CUDA: &str = "nvidia/*";

/// The file in a finished folder that says which wheels it was made from.
const STAMP: &str = ".pins";

/// How pip unpacks exactly the wheels that a list names.
const PIP: &str = "--quiet --no-input --disable-pip-version-check --no-compile --no-deps \
                   --only-binary=:all: --require-hashes";
const ADVICE: &str = "\
    xtask brings what is missing with `python3 -m pip`, which needs no root; `python3 -m pip config list` shows its index.\n\
    Install Python 3 and its pip (for example `apt-get install python3-pip`).\n\
    Or install libclang and the CUDA headers yourself, and set LIBCLANG_PATH and CUDA_HOME to their folders.";

/// The pinned CUDA toolkit that `setup --cuda` makes.
pub fn toolkit_folder(workspace: &Workspace) -> PathBuf {
    workspace.setup_folder().join("cuda")
}

/// Makes sure that a build will find libclang and `cuda.h`, and with `cuda` a CUDA compiler.
///
/// Says on standard error what it uses if `tell`, and what it brings always.
pub fn ensure(workspace: &Workspace, cuda: bool, tell: bool) -> Result<()> {
    let say = |line: String| {
        if tell {
            eprintln!("xtask: {line}");
        }
    };
    let _lock = lock(workspace)?;

    let libclang = workspace.setup_folder().join("libclang");
    let own = match is_made_from(&libclang, LIBCLANG)? {
        true => None,
        false => own_libclang()?,
    };
    if let Some(path) = own {
        say(format!("libclang: {path}, the machine's own"));
    } else {
        make(workspace, &libclang, LIBCLANG, IN_LIBCLANG)?;
        say(format!("libclang: {}", workspace.short(&libclang)));
    }

    let toolkit = toolkit_folder(workspace);
    let is_full = is_made_from(&toolkit, TOOLKIT)?;
    let is_enough = is_full || is_made_from(&toolkit, RUNTIME)?;
    if let Some(found) = own_headers().filter(|_| !cuda && !is_enough) {
        for wrong in found.wrong {
            eprintln!("xtask: warning: {wrong}");
        }
        let include = found.include.display();
        say(format!("cuda.h: {include}, the machine's own"));
    } else {
        let wheels = if cuda || is_full { TOOLKIT } else { RUNTIME };
        make(workspace, &toolkit, wheels, IN_CUDA)?;
        say(format!("CUDA: {}", workspace.short(&toolkit)));
    }
    Ok(())
}

/// The machine's own libclang of version 9 or newer, found just as the build script will find it.
fn own_libclang() -> Result<Option<String>> {
    let is_loaded = clang_sys::load().is_ok();
    let library = clang_sys::get_library().filter(|_| is_loaded);
    let recent = library.filter(|library| library.version() >= Some(clang_sys::Version::V9_0));
    let path = recent.map(|library| library.path().display().to_string());
    // Nothing of it is used here, and unloading can only fail if it was never loaded.
    let _ = clang_sys::unload();
    match std::env::var_os("LIBCLANG_PATH").filter(|_| path.is_none()) {
        None => Ok(path),
        Some(path) => bail!(
            "LIBCLANG_PATH is {}, where no libclang of version 9 or newer is.\n\
             Unset it, or set it to the folder that holds libclang.so.",
            path.display()
        ),
    }
}

/// The machine's own include folder with usable CUDA headers, and the variables that name none.
fn own_headers() -> Option<Found> {
    places::search(&places::places(|name| std::env::var_os(name), &[])).ok()
}

/// The folder of another version's headers, brought if it is not there.
pub fn ensure_headers(workspace: &Workspace, version: &str, key: &str) -> Result<PathBuf> {
    let _lock = lock(workspace)?;
    let folder = workspace.setup_folder().join("headers").join(version);
    make(workspace, &folder, &[key], IN_CUDA)?;
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
fn lock(workspace: &Workspace) -> Result<fs::File> {
    let setup = workspace.setup_folder();
    fs::create_dir_all(&setup)?;
    let file = fs::File::create(setup.join(".lock"))?;
    file.lock()?;
    Ok(file)
}

fn is_made_from(folder: &Path, keys: &[&str]) -> Result<bool> {
    let requirements = requirements(keys)?;
    Ok(fs::read_to_string(folder.join(STAMP)).is_ok_and(|stamp| stamp == requirements))
}

/// Makes `folder` of what lies at `place` in the wheels of `keys`, unless it is made of them already. It moves to its final
/// place only when it is whole.
fn make(workspace: &Workspace, folder: &Path, keys: &[&str], place: &str) -> Result<()> {
    if is_made_from(folder, keys)? {
        return Ok(());
    }
    let (shell, requirements) = (&workspace.shell, requirements(keys)?);
    let work = workspace.setup_folder().join(".partial");
    shell.remove_path(&work)?;
    let (list, unpacked) = (work.join("requirements.txt"), work.join("unpacked"));
    shell.write_file(&list, &requirements)?;
    eprintln!("xtask: bringing {}", keys.join(", "));
    let options = PIP.split(' ');
    let pip = cmd!(
        shell,
        "python3 -m pip install {options...} --target {unpacked} -r {list}"
    );
    let pip = pip.env("PIP_REQUIRE_VIRTUALENV", "false").ignore_stdout();
    let pip = pip
        .env("PIP_USER", "0")
        .env("PIP_ROOT_USER_ACTION", "ignore");
    pip.quiet().run().context(ADVICE)?;
    let mut found = glob::glob(&unpacked.join(place).to_string_lossy())?.flatten();
    let whole = found.find(|path| path.is_dir());
    let whole = whole.with_context(|| format!("{keys:?} hold no {place}"))?;
    files::keep_times(folder, &whole)?;
    fs::write(whole.join(STAMP), requirements)?;
    shell.remove_path(folder)?;
    shell.create_dir(folder.parent().unwrap_or(folder))?;
    fs::rename(&whole, folder)?;
    shell.remove_path(&work)?;
    Ok(())
}

/// The pins of `keys` (`name==version`), a line each. pip itself refuses one that has no version or no good hash.
fn requirements(keys: &[&str]) -> Result<String> {
    let mut lines = String::new();
    for key in keys {
        let mut pins = PINS.lines();
        let pin = pins.find(|line| line.split(' ').next() == Some(key));
        lines += pin.with_context(|| format!("xtask/pins.txt has no pin for {key}"))?;
        lines += "\n";
    }
    Ok(lines)
}

#[cfg(test)]
mod unit {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_file_of_pins_holds_every_set_and_each_pin_once_with_version_and_hash() {
        let mut keys = BTreeSet::new();
        let pins = PINS.lines().filter(|line| line.contains("=="));
        for (key, hashes) in pins.map(|pin| pin.split_once(' ').unwrap()) {
            assert!(keys.insert(key), "{key} is there twice");
            let (name, version) = key.split_once("==").unwrap();
            assert!(!name.is_empty() && !version.is_empty(), "{key}");
            for hash in hashes.split(' ') {
                let digits = hash.strip_prefix("--hash=sha256:").unwrap();
                let is_hash = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
                assert!(is_hash && digits.len() == 64, "{key}");
            }
        }
        let headers = crate::headers::VERSIONS.map(|(_, key)| key);
        for set in [LIBCLANG, RUNTIME, TOOLKIT, &headers] {
            assert_eq!(requirements(set).unwrap().lines().count(), set.len());
        }
        let error = requirements(&["nothing==0"]).unwrap_err().to_string();
        assert!(error.contains("nothing==0"), "{error}");
    }

    #[test]
    fn the_configuration_names_what_the_set_up_folder_holds() {
        let base = tempfile::tempdir().unwrap();
        let setup = base.path().join("a \"b\"");
        assert_eq!(configuration(&setup), "");

        fs::create_dir_all(setup.join("cuda/include")).unwrap();
        fs::write(setup.join("cuda/include/cuda.h"), "").unwrap();
        let escaped = format!("{}/a \\\"b\\\"", base.path().display());
        let cuda = format!("[env]\nCUDA_HOME = \"{escaped}/cuda\"\n");
        assert_eq!(configuration(&setup), cuda);

        fs::create_dir_all(setup.join("libclang")).unwrap();
        fs::write(setup.join("libclang/libclang.so"), "").unwrap();
        let both = format!("{cuda}LIBCLANG_PATH = \"{escaped}/libclang\"\n");
        assert_eq!(configuration(&setup), both);
    }
}
