//! Brings what the machine lacks into the set-up folder, as wheels, with the machine's own pip.
//! `xtask/pins` lists the wheels of each folder, by exact version and hash.

use crate::files;
use crate::workspace::Workspace;
use anyhow::{Context, Result, bail};
use fs_err as fs;
pub use places::cuda_version;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use xshell::cmd;

#[path = "../../crates/cuda-vmm-sys/build/places.rs"]
mod places;

/// The list of the headers that a build takes if the machine has none, and that of the whole compiler.
const RUNTIME: &str = "13.0";
const TOOLKIT: &str = "toolkit";

/// The list of what OpenAI's client for Python needs.
const CLIENT: &str = "openai";

/// Where unpacked wheels hold what is wanted of them.
const IN_LIBCLANG: &str = "clang/native";
const IN_CUDA: &str = "nvidia/*";

/// The file in a finished folder that says which wheels it was made from.
const STAMP: &str = ".pins";

/// How pip unpacks exactly the wheels that a list names. It refuses one without a version or a hash.
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
    let say = |line: String| tell.then(|| eprintln!("xtask: {line}"));
    let _lock = lock(workspace)?;

    let libclang = workspace.setup_folder().join("libclang");
    let own = match is_made_from(workspace, &libclang, "libclang")? {
        true => None,
        false => own_libclang()?,
    };
    if let Some(path) = own {
        say(format!("libclang: {path}, the machine's own"));
    } else {
        make(workspace, &libclang, "libclang", IN_LIBCLANG)?;
        say(format!("libclang: {}", workspace.short(&libclang)));
    }

    let toolkit = toolkit_folder(workspace);
    let is_full = is_made_from(workspace, &toolkit, TOOLKIT)?;
    let is_enough = is_full || is_made_from(workspace, &toolkit, RUNTIME)?;
    // The machine's own headers, with the variables that name none.
    let own = places::search(&places::places(|name| std::env::var_os(name), &[]));
    if let Some(found) = own.ok().filter(|_| !cuda && !is_enough) {
        for wrong in found.wrong {
            eprintln!("xtask: warning: {wrong}");
        }
        let include = found.include.display();
        say(format!("cuda.h: {include}, the machine's own"));
    } else {
        let list = if cuda || is_full { TOOLKIT } else { RUNTIME };
        make(workspace, &toolkit, list, IN_CUDA)?;
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

/// The folder of the headers of a version, brought if it is not there.
pub fn ensure_headers(workspace: &Workspace, version: &str) -> Result<PathBuf> {
    let _lock = lock(workspace)?;
    let folder = workspace.setup_folder().join("headers").join(version);
    make(workspace, &folder, version, IN_CUDA)?;
    Ok(folder)
}

/// The folder of the packages of OpenAI's client for Python, brought if it is not there.
pub fn ensure_client(workspace: &Workspace) -> Result<PathBuf> {
    let _lock = lock(workspace)?;
    let folder = workspace.setup_folder().join(CLIENT);
    make(workspace, &folder, CLIENT, "")?;
    Ok(folder)
}

/// What programs outside the checkout put into their `.cargo/config.toml`; empty if they need none.
pub fn configuration(setup: &Path) -> Result<String> {
    let mut variables = BTreeMap::new();
    for (variable, folder, file) in [
        ("CUDA_HOME", "cuda", "include/cuda.h"),
        ("LIBCLANG_PATH", "libclang", "libclang.so"),
    ] {
        let folder = setup.join(folder);
        if folder.join(file).is_file() {
            variables.insert(variable, folder);
        }
    }
    let is_needed = !variables.is_empty();
    let file = BTreeMap::from_iter(is_needed.then_some(("env", variables)));
    Ok(toml::to_string(&file)?)
}

/// Keeps a second xtask out while one changes the set-up folder; freed when dropped.
fn lock(workspace: &Workspace) -> Result<fs::File> {
    let setup = workspace.setup_folder();
    fs::create_dir_all(&setup)?;
    let file = fs::File::create(setup.join(".lock"))?;
    file.lock()?;
    Ok(file)
}

fn pins_of(workspace: &Workspace, list: &str) -> PathBuf {
    workspace.root.join(format!("xtask/pins/{list}.txt"))
}

/// The wheels of a list, without its comments.
fn pins(workspace: &Workspace, list: &str) -> Result<String> {
    let list = fs::read_to_string(pins_of(workspace, list))?;
    let pins = list.lines().filter(|line| !line.starts_with('#'));
    Ok(pins.map(|pin| format!("{pin}\n")).collect())
}

fn is_made_from(workspace: &Workspace, folder: &Path, list: &str) -> Result<bool> {
    let pins = pins(workspace, list)?;
    Ok(fs::read_to_string(folder.join(STAMP)).is_ok_and(|stamp| stamp == pins))
}

/// Makes `folder` of the wheels of a list, unless it is made; it moves there only when it is whole.
fn make(workspace: &Workspace, folder: &Path, list: &str, place: &str) -> Result<()> {
    if is_made_from(workspace, folder, list)? {
        return Ok(());
    }
    let (shell, pins) = (&workspace.shell, pins(workspace, list)?);
    let work = workspace.setup_folder().join(".partial");
    shell.remove_path(&work)?;
    eprintln!("xtask: bringing the wheels of xtask/pins/{list}.txt");
    let (options, list) = (PIP.split(' '), pins_of(workspace, list));
    let target = ["--target".into(), work.clone(), "-r".into(), list.clone()];
    let pip = cmd!(shell, "python3 -m pip install {options...}").args(target);
    let pip = pip.envs([("PIP_REQUIRE_VIRTUALENV", "false"), ("PIP_USER", "0")]);
    let pip = pip.env("PIP_ROOT_USER_ACTION", "ignore");
    pip.ignore_stdout().quiet().run().context(ADVICE)?;
    let mut found = files::matching(&work.join(place).to_string_lossy());
    let whole = found.find(|path| path.is_dir());
    let whole = whole.with_context(|| format!("the wheels of {list:?} hold no {place}"))?;
    files::keep_times(folder, &whole)?;
    fs::write(whole.join(STAMP), pins)?;
    shell.remove_path(folder)?;
    shell.create_dir(folder.parent().unwrap_or(folder))?;
    fs::rename(&whole, folder)?;
    Ok(shell.remove_path(&work)?)
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn every_list_has_pins_with_version_and_hash() {
        let workspace = Workspace::find().unwrap();
        let headers = crate::headers::VERSIONS;
        for list in [&headers[..], &["libclang", RUNTIME, TOOLKIT, CLIENT]].concat() {
            let pins = pins(&workspace, list).unwrap();
            assert!(!pins.is_empty(), "{list}");
            for pin in pins.lines() {
                let (key, hashes) = pin.split_once(' ').expect(pin);
                let is_hash = |hash: &str| {
                    let digits = hash.strip_prefix("--hash=sha256:").unwrap_or_default();
                    digits.len() == 64 && digits.bytes().all(|digit| digit.is_ascii_hexdigit())
                };
                assert!(hashes.split(' ').all(is_hash), "{pin}");
                let version = key.split_once("==").map(|(_, version)| version);
                assert!(version.is_some_and(|version| !version.is_empty()), "{pin}");
                assert_eq!(pins.matches(&format!("{key} ")).count(), 1, "{pin}");
            }
        }
        let error = super::pins(&workspace, "nothing").unwrap_err().to_string();
        assert!(error.contains("nothing.txt"), "{error}");
    }

    #[test]
    fn the_configuration_names_what_the_set_up_folder_holds() {
        let base = tempfile::tempdir().unwrap();
        let setup = base.path().join("a \"b\"");
        assert_eq!(configuration(&setup).unwrap(), "");
        let mut expected = toml::Table::new();
        for (variable, folder, file) in [
            ("CUDA_HOME", "cuda/include", "cuda.h"),
            ("LIBCLANG_PATH", "libclang", "libclang.so"),
        ] {
            fs::create_dir_all(setup.join(folder)).unwrap();
            fs::write(setup.join(folder).join(file), "").unwrap();
            let folder = setup.join(folder.trim_end_matches("/include"));
            expected.insert(variable.to_owned(), folder.to_str().unwrap().into());
            let configuration: toml::Table = configuration(&setup).unwrap().parse().unwrap();
            assert_eq!(configuration["env"], expected.clone().into());
        }
    }
}
