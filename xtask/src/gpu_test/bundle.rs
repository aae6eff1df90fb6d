//! The bundle: everything that the matrix needs on a machine without a toolchain.

use super::arguments::Usage;
use super::build::{self, Everything};
use super::manifest::Manifest;
use super::program::{Program, Programs};
use super::{cell::Cell, probe};
use crate::workspace::Workspace;
use crate::{files, progress};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The script that unpacks the bundle and starts it.
const RUN: &str = include_str!("run.sh");
/// The packed programs.
const ARCHIVE: &str = "bundle.tar.xz";
/// How they are packed. Several have the same kernels of Candle, so the packer looks further back than one is long.
const XZ: &str = "xz -T1 --lzma2=preset=6,dict=128MiB";
/// The most that a packed bundle may weigh.
const LIMIT_BYTES: u64 = 40 << 20;

/// Builds everything and packs it into `folder`.
pub fn make(workspace: &Workspace, folder: &Path, compute_cap: u32) -> Result<()> {
    let target = workspace.target.join("gpu-test");
    let built = build::everything(workspace, &target, compute_cap)?;
    let stage = target.join("stage");
    fill(&stage, &built, &probe::compile(&target)?)?;
    let bytes = pack(&stage, folder)?;
    ensure!(
        bytes <= LIMIT_BYTES,
        "the bundle has {bytes} bytes, more than the {LIMIT_BYTES} allowed"
    );
    println!(
        "{}: {} test programs, {:.1} MB packed",
        workspace.short(folder),
        files::entries(&stage.join("tests"))?.len(),
        bytes as f64 / 1e6
    );
    println!("On the machine with the GPU, which needs no toolchain:");
    println!("    OUT=FOLDER {}/run", folder.display());
    println!(
        "It writes FOLDER/report.md, and exits with 0 (every row PASS), 1 (a row FAIL) or 2 (some SKIPPED)."
    );
    println!("    {}/run --help", folder.display());
    Ok(())
}

/// Puts what was built in its place below `stage`.
fn fill(stage: &Path, built: &Everything, probe: &Path) -> Result<()> {
    files::remove_tree(stage)?;
    for (place, from) in [
        (in_bin("xtask"), built.xtask.as_path()),
        (in_bin("probe"), probe),
    ] {
        copy(from, &stage.join(place))?;
    }
    for (program, from) in &built.programs {
        copy(from, &in_tests(stage, program))?;
    }
    for (name, from) in &built.others {
        copy(from, &in_others(stage, name))?;
    }
    built.manifest.write(stage)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(folder) = to.parent() {
        files::make(folder)?;
    }
    fs::copy(from, to).with_context(|| format!("copying {}", from.display()))?;
    files::executable(to)
}

/// Packs `stage` into `folder`, and answers the size of the archive in bytes.
fn pack(stage: &Path, folder: &Path) -> Result<u64> {
    files::make(folder)?;
    let archive = folder.join(ARCHIVE);
    progress::during("packing the bundle", || {
        let status = Command::new("tar")
            .args(["-I", XZ, "--sort=name", "-cf"])
            .arg(&archive)
            .arg("-C")
            .arg(stage)
            .arg(".")
            .status()
            .context("tar could not be started")?;
        ensure!(status.success(), "tar: {status}");
        Ok(())
    })?;
    let script = folder.join("run");
    fs::write(&script, RUN).with_context(|| format!("writing {}", script.display()))?;
    files::executable(&script)?;
    Ok(fs::metadata(&archive)?.len())
}

/// An unpacked bundle.
pub struct Unpacked {
    folder: PathBuf,
}

impl Unpacked {
    /// The one in `folder`.
    pub fn new(folder: &Path) -> Result<Self> {
        let folder = std::path::absolute(folder).context("the bundle's folder")?;
        Ok(Self { folder })
    }

    /// The folder itself.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The probe.
    pub fn probe(&self) -> PathBuf {
        self.folder.join(in_bin("probe"))
    }

    /// What its build says of itself.
    pub fn manifest(&self) -> Result<Manifest> {
        Manifest::read(&self.folder)
    }

    /// Every test program of the matrix.
    pub fn programs(&self) -> Programs {
        let programs = Cell::all(false)
            .into_iter()
            .flat_map(|cell| cell.programs());
        programs
            .map(|program| (program, in_tests(&self.folder, &program)))
            .collect()
    }

    /// A program that is no test.
    ///
    /// # Errors
    ///
    /// [`Usage`] if there is none of this name.
    pub fn other(&self, name: &str) -> Result<PathBuf> {
        let others = files::entries(&self.folder.join("programs"))?;
        if let Some((_, path)) = others.iter().find(|(other, _)| other == name) {
            return Ok(path.clone());
        }
        let names: Vec<_> = others
            .iter()
            .map(|(name, _)| name.display().to_string())
            .collect();
        let names = names.join(", ");
        Err(Usage(format!(
            "the bundle has no program {name:?}; it has {names}"
        ))
        .into())
    }
}

fn in_bin(name: &str) -> PathBuf {
    Path::new("bin").join(name)
}

fn in_tests(folder: &Path, program: &Program) -> PathBuf {
    folder.join("tests").join(program.file_name())
}

fn in_others(folder: &Path, name: &str) -> PathBuf {
    folder.join("programs").join(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_is_where_the_unpacked_bundle_looks() {
        let folder = tempfile::tempdir().unwrap();
        let built = folder.path().join("built");
        fs::write(&built, "#!/bin/sh\n").unwrap();
        let cells = Cell::all(false);
        let programs: Programs = cells
            .iter()
            .flat_map(Cell::programs)
            .map(|program| (program, built.clone()))
            .collect();
        let everything = Everything {
            programs,
            others: vec![("demo", built.clone())],
            xtask: built.clone(),
            manifest: Manifest {
                commit: "abc".to_owned(),
                compiler: "rustc".to_owned(),
                candle_kernels: None,
                libraries: vec!["libx.so".to_owned()],
            },
        };
        let stage = folder.path().join("stage");
        fill(&stage, &everything, &built).unwrap();
        let bundle = folder.path().join("bundle");
        assert!(pack(&stage, &bundle).unwrap() > 0);
        assert!(bundle.join("run").is_file());

        let unpacked = folder.path().join("unpacked");
        files::make(&unpacked).unwrap();
        let status = Command::new("tar")
            .arg("-xJf")
            .arg(bundle.join(ARCHIVE))
            .arg("-C")
            .arg(&unpacked)
            .status()
            .unwrap();
        assert!(status.success());
        let unpacked = Unpacked::new(&unpacked).unwrap();
        assert_eq!(unpacked.manifest().unwrap(), everything.manifest);
        assert!(unpacked.probe().is_file());
        assert!(unpacked.programs().values().all(|path| path.is_file()));
        assert!(unpacked.other("demo").unwrap().is_file());
        assert!(unpacked.other("../demo").unwrap_err().is::<Usage>());
    }
}
