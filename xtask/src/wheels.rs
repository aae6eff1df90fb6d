//! Bringing wheels with the machine's own pip, and unpacking them.

use crate::pins::Pin;
use crate::{files, progress};
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;

const NEEDS: &str = "xtask brings what is missing with `python3 -m pip`, which needs no root.\n\
     Install Python 3 and its pip (for example `apt-get install python3-pip`).";
const ELSE: &str = "Or install libclang and the CUDA headers yourself, and set LIBCLANG_PATH and CUDA_HOME to their folders.";

/// Fails with advice unless `python3 -m pip` answers.
pub fn check_pip() -> Result<()> {
    match Command::new("python3")
        .args(["-m", "pip", "--version"])
        .output()
    {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => bail!(
            "python3 is here, but `python3 -m pip` does not work: {}\n{NEEDS}\n{ELSE}",
            String::from_utf8_lossy(&output.stderr).trim()
        ),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            bail!("there is no python3.\n{NEEDS}\n{ELSE}")
        }
        Err(error) => Err(error).context("python3 could not be started"),
    }
}

/// Downloads the wheel of `pin`, checks its hash and unpacks it into a folder below `work`.
pub fn bring(pin: &Pin, work: &Path) -> Result<PathBuf> {
    let download = work.join("download");
    files::remove_tree(&download)?;
    files::make(&download)?;
    let requirements = download.join("requirements.txt");
    fs::write(&requirements, format!("{}\n", pin.requirement))
        .with_context(|| format!("writing {}", requirements.display()))?;
    progress::during(&format!("downloading {}", pin.key), || {
        let output = Command::new("python3")
            .args(["-m", "pip", "download", "--quiet", "--no-input"])
            .args(["--disable-pip-version-check", "--no-deps"])
            .args(["--only-binary=:all:", "--require-hashes", "--dest"])
            .arg(&download)
            .arg("-r")
            .arg(&requirements)
            .env("PIP_REQUIRE_VIRTUALENV", "false")
            .output()
            .context("python3 could not be started")?;
        ensure!(
            output.status.success(),
            "pip could not download {}:\n{}\n\
             `python3 -m pip config list` shows which index it asked.\n{ELSE}",
            pin.key,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    })?;
    let wheel = files::entries(&download)?
        .into_iter()
        .map(|(_, path)| path)
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .with_context(|| format!("pip brought no wheel for {}", pin.key))?;

    let unpacked = work.join("unpacked");
    files::remove_tree(&unpacked)?;
    progress::during(&format!("unpacking {}", pin.key), || {
        let output = Command::new("python3")
            .args(["-m", "zipfile", "-e"])
            .arg(&wheel)
            .arg(&unpacked)
            .output()
            .context("python3 could not be started")?;
        ensure!(
            output.status.success(),
            "python3 could not unpack {}:\n{}",
            wheel.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    })?;
    files::remove_tree(&download)?;
    Ok(unpacked)
}

/// The folders of an unpacked NVIDIA wheel that hold `include`, `lib`, `bin` and so on.
pub fn toolkit_roots(unpacked: &Path) -> Result<Vec<PathBuf>> {
    let roots: Vec<PathBuf> = files::entries(&unpacked.join("nvidia"))?
        .into_iter()
        .map(|(_, path)| path)
        .filter(|path| path.is_dir())
        .collect();
    ensure!(
        !roots.is_empty(),
        "the wheel unpacked in {} has no folder below nvidia/",
        unpacked.display()
    );
    Ok(roots)
}

/// The libclang of the unpacked wheel of that name.
pub fn libclang(unpacked: &Path) -> Result<PathBuf> {
    for (_, data) in files::entries(unpacked)? {
        for below in ["platlib/clang/native", "purelib/clang/native", "native"] {
            let library = data.join(below).join("libclang.so");
            if library.is_file() {
                return Ok(library);
            }
        }
    }
    bail!(
        "the wheel unpacked in {} has no libclang.so",
        unpacked.display()
    )
}
