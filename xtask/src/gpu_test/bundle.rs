//! The bundle: everything that the matrix needs on a machine without a toolchain.

use super::arguments::Usage;
use super::build::{Manifest, OTHERS};
use super::cell::{Cell, Program};
use super::probe;
use super::runner::Programs;
use crate::files;
use crate::workspace::Workspace;
use anyhow::{Context, Result, ensure};
use fs_err as fs;
use std::path::{Path, PathBuf};
use xshell::{Shell, cmd};

/// The packed programs.
const ARCHIVE: &str = "bundle.tar.xz";
/// How they are packed. Several have the same kernels of Candle, so the packer looks further back than one is long.
const XZ: &str = "xz -T1 --lzma2=preset=6,dict=128MiB";
/// The most that a packed bundle may weigh.
const LIMIT_BYTES: u64 = 40 << 20;
/// Where things are in it: what the build says of itself, this program, the probe.
const MANIFEST: &str = "bundle.json";
const XTASK: &str = "bin/xtask";
pub const PROBE: &str = "bin/probe";

/// Builds everything and packs it into `folder`.
pub fn make(workspace: &Workspace, folder: &Path, compute_cap: u32) -> Result<()> {
    let builder = super::builder(workspace, compute_cap);
    let programs = Cell::all(false).iter().flat_map(Cell::programs).collect();
    let programs = builder.programs(&programs)?;
    let manifest = builder.manifest(&programs)?;
    let xtask = env!("CARGO_PKG_NAME");
    let probe = probe::compile(&workspace.shell, &builder.target)?;
    let mut built = vec![
        (XTASK.to_owned(), builder.other((xtask, xtask, "", "bin"))?),
        (PROBE.to_owned(), probe),
    ];
    for other in OTHERS {
        built.push((other_file(other.0), builder.other(other)?));
    }
    let tests = programs.len();
    for (program, from) in programs {
        built.push((test_file(&program), from));
    }
    let stage = builder.target.join("stage");
    fill(&workspace.shell, &stage, &built, &manifest)?;
    let bytes = pack(&workspace.shell, &stage, folder)?;
    let is_small = bytes <= LIMIT_BYTES;
    ensure!(
        is_small,
        "the bundle has {bytes} bytes, more than the {LIMIT_BYTES} allowed"
    );
    let (short, folder) = (workspace.short(folder), folder.display());
    let megabytes = bytes as f64 / 1e6;
    println!(
        "{short}: {tests} test programs, {megabytes:.1} MB packed\n\
         On the machine with the GPU, which needs no toolchain:\n    OUT=FOLDER {folder}/run\n\
         It writes FOLDER/report.md, and exits with 0 (every row PASS), 1 (a row FAIL) or 2 (some SKIPPED).\n    \
         {folder}/run --help"
    );
    Ok(())
}

/// Puts what was built in its place below `stage`.
fn fill(
    shell: &Shell,
    stage: &Path,
    built: &[(String, PathBuf)],
    manifest: &Manifest,
) -> Result<()> {
    shell.remove_path(stage)?;
    let manifest = serde_json::to_string_pretty(manifest)?;
    shell.write_file(stage.join(MANIFEST), manifest)?;
    for (place, from) in built {
        let to = stage.join(place);
        shell.create_dir(to.parent().unwrap_or(stage))?;
        shell.copy_file(from, &to)?;
        files::executable(&to)?;
    }
    Ok(())
}

/// Packs `stage` into `folder`, and returns the size of the archive in bytes.
fn pack(shell: &Shell, stage: &Path, folder: &Path) -> Result<u64> {
    eprintln!("xtask: packing the bundle");
    let (script, archive) = (folder.join("run"), folder.join(ARCHIVE));
    shell.write_file(&script, include_str!("run.sh"))?;
    files::executable(&script)?;
    let tar = cmd!(shell, "tar -I {XZ} --sort=name -cf {archive} -C {stage} .");
    tar.quiet().run()?;
    Ok(fs::metadata(&archive)?.len())
}

/// What the build of the bundle in `folder` says of itself.
pub fn manifest(folder: &Path) -> Result<Manifest> {
    let text = fs::read_to_string(folder.join(MANIFEST))?;
    serde_json::from_str(&text).with_context(|| format!("{MANIFEST} is damaged"))
}

/// Every test program of the matrix in `folder`.
pub fn programs(folder: &Path) -> Programs {
    let cells = Cell::all(false);
    let programs = cells.iter().flat_map(Cell::programs);
    let path = |program: &Program| folder.join(test_file(program));
    programs.map(|program| (program, path(&program))).collect()
}

/// A program in `folder` that is no test; a usage error if there is none of this name.
pub fn other(folder: &Path, name: &str) -> Result<PathBuf> {
    let others = files::entries(&folder.join(other_file("")))?;
    let names = others.iter().filter_map(|path| path.file_name()?.to_str());
    let names: Vec<&str> = names.collect();
    if names.contains(&name) {
        return Ok(folder.join(other_file(name)));
    }
    let names = names.join(", ");
    let usage = format!("the bundle has no program {name:?}; it has {names}");
    Err(Usage(usage).into())
}

fn test_file(program: &Program) -> String {
    format!("tests/{}", program.file_name())
}

fn other_file(name: &str) -> String {
    format!("programs/{name}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn what_is_packed_is_where_the_unpacked_bundle_looks() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let built = folder.join("built");
        fs::write(&built, "#!/bin/sh\n").unwrap();
        let cells = Cell::all(false);
        let programs: BTreeSet<Program> = cells.iter().flat_map(Cell::programs).collect();
        let tests = programs.iter().map(test_file);
        let files = tests.chain([XTASK.to_owned(), PROBE.to_owned(), other_file("demo")]);
        let files: Vec<_> = files.map(|file| (file, built.clone())).collect();
        let packed = Manifest {
            commit: "abc".to_owned(),
            compiler: "rustc".to_owned(),
            candle_kernels: None,
            libraries: vec!["libx.so".to_owned()],
        };
        let (stage, bundle) = (folder.join("stage"), folder.join("bundle"));
        let shell = Shell::new().unwrap();
        fill(&shell, &stage, &files, &packed).unwrap();
        assert!(pack(&shell, &stage, &bundle).unwrap() > 0);
        assert!(bundle.join("run").is_file());

        let unpacked = shell.create_dir(folder.join("unpacked")).unwrap();
        let archive = bundle.join(ARCHIVE);
        let tar = cmd!(shell, "tar -xJf {archive} -C {unpacked}");
        tar.run().unwrap();
        assert_eq!(manifest(&unpacked).unwrap(), packed);
        assert!(unpacked.join(PROBE).is_file());
        let programs = super::programs(&unpacked);
        assert!(programs.values().all(|path| path.is_file()));
        assert!(other(&unpacked, "demo").unwrap().is_file());
        assert!(other(&unpacked, "../demo").unwrap_err().is::<Usage>());
    }
}
