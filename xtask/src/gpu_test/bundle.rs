//! The bundle: everything that the matrix needs on a machine without a toolchain.

use super::arguments::Usage;
use super::build::{Builder, Manifest};
use super::cell::{
    BENCH, BENCH_CANDLE, BENCH_SERVE, DEMO, GENERATE, SERVE, SOAK, TWO_MODELS, XTASK,
};
use super::cell::{Cell, Program, Programs};
use super::conditions::compile_probe;
use crate::files;
use crate::workspace::Workspace;
use anyhow::{Context, Result, ensure};
use fs_err as fs;
use std::path::{Path, PathBuf};
use xshell::{Shell, cmd};

const ARCHIVE: &str = "bundle.tar.xz";
/// Several programs have the same kernels of Candle, so the packer looks back beyond one.
const XZ: &str = "xz -T1 --lzma2=preset=6,dict=128MiB";
const LIMIT_BYTES: u64 = 40 << 20;
/// Where things are in it that are no programs: what the build says of itself, and the probe.
const MANIFEST: &str = "bundle.json";
pub const PROBE: &str = "bin/probe";
/// Those of its programs that are no tests, and can be asked for by name.
pub const OTHERS: [Program; 8] = [
    DEMO,
    GENERATE,
    TWO_MODELS,
    SOAK,
    BENCH,
    BENCH_CANDLE,
    SERVE,
    BENCH_SERVE,
];

pub fn make(workspace: &Workspace, folder: &Path, compute_cap: u32) -> Result<()> {
    let builder = Builder::new(workspace, compute_cap);
    let wanted = tests().chain(OTHERS).chain([XTASK]).collect();
    let programs = builder.programs(&wanted)?;
    let manifest = builder.manifest(&programs)?;
    let probe = compile_probe(&workspace.shell, &builder.target)?;
    let tests = programs.keys().filter(|it| it.kind == "test").count();
    let built = programs.iter().map(|(it, file)| (it.place(), &**file));
    let built: Vec<_> = built.chain([(PROBE.to_owned(), &*probe)]).collect();
    let stage = builder.target.join("stage");
    fill(&workspace.shell, &stage, &built, &manifest)?;
    let bytes = pack(&workspace.shell, &stage, folder)?;
    let is_small = bytes <= LIMIT_BYTES;
    ensure!(is_small, "the bundle's {bytes} bytes exceed {LIMIT_BYTES}");
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

/// Every test program of the matrix.
fn tests() -> impl Iterator<Item = Program> {
    Cell::all(false).into_iter().flat_map(|cell| cell.programs)
}

/// Puts what was built in its place below `stage`.
fn fill(shell: &Shell, stage: &Path, built: &[(String, &Path)], of: &Manifest) -> Result<()> {
    shell.remove_path(stage)?;
    shell.write_file(stage.join(MANIFEST), serde_json::to_string_pretty(of)?)?;
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

pub fn manifest(folder: &Path) -> Result<Manifest> {
    let text = fs::read_to_string(folder.join(MANIFEST))?;
    serde_json::from_str(&text).with_context(|| format!("{MANIFEST} is damaged"))
}

pub fn programs(folder: &Path) -> Programs {
    let places = tests().map(|program| (program, folder.join(program.place())));
    places.collect()
}

/// A program in `folder` that is no test; a usage error if there is none of this name.
pub fn other(folder: &Path, name: &str) -> Result<PathBuf> {
    let others = files::matching(&folder.join("programs/*").to_string_lossy());
    let names = others.filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()));
    let names: Vec<String> = names.collect();
    let all = names.join(", ");
    let usage = format!("the bundle has no program {name:?}; it has {all}");
    ensure!(names.iter().any(|it| it == name), Usage(usage));
    Ok(folder.join("programs").join(name))
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn what_is_packed_is_where_the_unpacked_bundle_looks() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let built = folder.join("built");
        fs::write(&built, "#!/bin/sh\n").unwrap();
        let programs = tests().chain([XTASK, DEMO]).map(|program| program.place());
        let files = programs.chain([PROBE.to_owned()]);
        let files: Vec<_> = files.map(|file| (file, &*built)).collect();
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
