//! `gpu-test`: the test matrix, on this machine or packed for another.

mod arguments;
mod build;
mod bundle;
mod cell;
mod conditions;
mod facts;
mod libraries;
mod manifest;
mod matrix;
mod probe;
mod process;
mod program;
mod report;
mod row;
mod runner;
mod sanitizer;
mod selection;
mod stand_ins;
mod stubs;
mod summary;
mod without_gpu;

pub use arguments::{Arguments, BundleArguments, COMPUTE_CAP, Usage};
pub use without_gpu::run as without_gpu;

use crate::bench;
use crate::workspace::Workspace;
use anyhow::{Context, Result};
use arguments::Other;
use bundle::Unpacked;
use cell::{Cell, Driver};
use conditions::Conditions;
use libraries::Libraries;
use manifest::Manifest;
use matrix::{Matrix, Plan};
use probe::Answer;
use program::{Program, Programs};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Makes a bundle in the folder `bundle`, or without one runs the matrix here. Answers the exit code.
pub fn run(arguments: &Arguments, bundle: Option<&Path>, compute_cap: u32) -> Result<u8> {
    if arguments.list {
        return list(arguments);
    }
    let workspace = Workspace::find()?;
    if let Some(folder) = bundle {
        bundle::make(&workspace, folder, compute_cap)?;
        return Ok(0);
    }
    let target = workspace.target.join("gpu-test");
    let plan = Plan::make(arguments, || probe::ask(&probe::compile(&target)?))?;
    let mut manifest = Manifest::of(&workspace);
    let mut conditions = Conditions::find(plan.gpu.clone(), arguments.sanitize);
    let mut programs = Programs::new();
    let runnable = |cell: &&Cell| conditions.obstacle(cell).is_none();
    let (real, simulated): (BTreeSet<Program>, BTreeSet<Program>) = plan
        .cells
        .iter()
        .filter(runnable)
        .flat_map(Cell::programs)
        .partition(|program| program.driver == Driver::Real);
    if !real.is_empty() {
        let built = build::real(&workspace, &target, compute_cap, &real, &mut manifest)?;
        programs.extend(built);
    }
    if !simulated.is_empty() {
        programs.extend(build::simulated(&workspace, &simulated)?);
    }
    conditions.libraries = Libraries::find(&manifest.libraries);
    let matrix = Matrix {
        arguments,
        plan,
        conditions,
        programs,
        manifest,
        folder: &target,
        report_folder: report_folder(&target),
        command: command("cargo xtask gpu-test", std::env::args_os().skip(2)),
    };
    let has_no_gpu = matches!(matrix.plan.gpu, Some(Answer::NoGpu(_)));
    let code = matrix.run()?;
    if has_no_gpu {
        println!(
            "To run the rows of the real driver elsewhere: cargo xtask gpu-test --bundle FOLDER"
        );
    }
    Ok(code)
}

/// A command that runs the facade's example `generate` on the real driver; builds it for GPUs of `compute_cap` and newer.
pub fn generate(workspace: &Workspace, compute_cap: u32) -> Result<Command> {
    let target = workspace.target.join("gpu-test");
    with_libraries(build::generate(workspace, &target, compute_cap)?)
}

/// A command that runs the measuring program of Candle's part on the real driver; builds it for GPUs of `compute_cap` and
/// newer.
pub fn bench_candle(workspace: &Workspace, compute_cap: u32) -> Result<Command> {
    let target = workspace.target.join("gpu-test");
    with_libraries(build::bench_candle(workspace, &target, compute_cap)?)
}

fn with_libraries((program, libraries): (PathBuf, Vec<String>)) -> Result<Command> {
    let mut command = Command::new(program);
    command.env("LD_LIBRARY_PATH", Libraries::find(&libraries).path()?);
    Ok(command)
}

/// Whether this machine has a CUDA driver with a GPU, be it one that fails.
pub fn has_gpu(workspace: &Workspace) -> Result<bool> {
    let program = probe::compile(&workspace.target.join("gpu-test"))?;
    Ok(!matches!(probe::ask(&program)?, Answer::NoGpu(_)))
}

/// What a bundle's `run` does. Answers the exit code.
pub fn run_bundle(arguments: &BundleArguments) -> Result<u8> {
    let unpacked = Unpacked::new(&arguments.folder)?;
    if let Some(Other::Program { name, arguments }) = &arguments.other {
        return run_other(&unpacked, name, arguments);
    }
    if arguments.matrix.list {
        return list(&arguments.matrix);
    }
    let plan = Plan::make(&arguments.matrix, || probe::ask(&unpacked.probe()))?;
    let manifest = unpacked.manifest()?;
    let mut conditions = Conditions::find(plan.gpu.clone(), arguments.matrix.sanitize);
    conditions.libraries = Libraries::find(&manifest.libraries);
    let script = arguments.beside.join("run");
    let matrix = Matrix {
        arguments: &arguments.matrix,
        plan,
        conditions,
        programs: unpacked.programs(),
        manifest,
        folder: unpacked.folder(),
        report_folder: report_folder(&arguments.beside),
        // What comes before is what the script says of itself: --folder and --beside with their values.
        command: command(&script.display().to_string(), std::env::args_os().skip(6)),
    };
    matrix.run()
}

/// Prints the rows' names, as on a machine with two GPUs.
fn list(arguments: &Arguments) -> Result<u8> {
    for cell in selection::select(arguments, None)? {
        println!("{}", cell.name());
    }
    Ok(0)
}

fn run_other(unpacked: &Unpacked, name: &str, arguments: &[OsString]) -> Result<u8> {
    let mut command = Command::new(unpacked.other(name)?);
    if [build::GENERATE, bench::CANDLE_PROGRAM].contains(&name) {
        let libraries = Libraries::find(&unpacked.manifest()?.libraries);
        command.env("LD_LIBRARY_PATH", libraries.path()?);
    }
    let status = command
        .args(arguments)
        .status()
        .with_context(|| format!("{name} could not be started"))?;
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(1))
}

/// Where the report goes: `$OUT`, or `usual` without one.
fn report_folder(usual: &Path) -> PathBuf {
    match std::env::var_os("OUT") {
        Some(out) if !out.is_empty() => PathBuf::from(out),
        _ => usual.to_owned(),
    }
}

/// The command line, as one would type it.
fn command(program: &str, arguments: impl Iterator<Item = OsString>) -> String {
    arguments.fold(program.to_owned(), |line, argument| {
        line + " " + &argument.to_string_lossy()
    })
}
