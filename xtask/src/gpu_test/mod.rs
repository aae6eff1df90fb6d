//! `gpu-test`: the test matrix, on this machine or packed for another.

mod arguments;
mod build;
mod bundle;
mod cell;
mod conditions;
mod matrix;
mod probe;
mod process;
mod report;
mod runner;
mod stand_ins;
mod without_gpu;

pub use arguments::{Arguments, BundleArguments, COMPUTE_CAP, Usage};
pub use build::{BENCH, BENCH_CANDLE, BENCHES, GENERATE};
pub use without_gpu::run as without_gpu;

use crate::workspace::{Workspace, code};
use anyhow::{Context, Result};
use arguments::Other;
use build::{Builder, OTHERS};
use cell::{Cell, Driver};
use conditions::{Conditions, Libraries};
use matrix::Matrix;
use probe::Answer;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

/// Makes a bundle in the folder `bundle`, or without one runs the matrix here. Returns the exit code.
pub fn run(
    workspace: &Workspace,
    arguments: &Arguments,
    bundle: Option<&Path>,
    compute_cap: u32,
) -> Result<u8> {
    if arguments.list {
        return list(arguments);
    }
    if let Some(folder) = bundle {
        bundle::make(workspace, &std::path::absolute(folder)?, compute_cap)?;
        return Ok(0);
    }
    let builder = builder(workspace, compute_cap);
    let probe = || probe::ask(&probe::compile(&workspace.shell, &builder.target)?);
    let conditions = Conditions::find(arguments, probe)?;
    let mut cells = arguments.select(conditions.gpus())?;
    cells.retain(|cell| conditions.obstacle(cell).is_none());
    let programs = cells.iter().flat_map(Cell::programs);
    let (real, simulated): (BTreeSet<_>, _) = programs.partition(|it| it.driver == Driver::Real);
    let mut programs = builder.programs(&real)?;
    let manifest = builder.manifest(&programs)?;
    if !simulated.is_empty() {
        programs.extend(build::simulated(workspace, &simulated)?);
    }
    let has_no_gpu = matches!(conditions.gpu, Some(Answer::NoGpu(_)));
    let matrix = Matrix {
        arguments,
        conditions,
        programs,
        manifest,
        folder: &builder.target,
        beside: &builder.target,
        command: ("cargo xtask gpu-test".to_owned(), 2),
    };
    let code = matrix.run()?;
    if has_no_gpu {
        let bundle = "cargo xtask gpu-test --bundle FOLDER";
        println!("To run the rows of the real driver elsewhere: {bundle}");
    }
    Ok(code)
}

/// Builds for GPUs of `compute_cap` (90 for 9.0) and newer.
fn builder(workspace: &Workspace, compute_cap: u32) -> Builder<'_> {
    let target = workspace.target.join("gpu-test");
    Builder {
        workspace,
        target,
        compute_cap,
    }
}

/// A command that runs a program of [`OTHERS`] on the real driver; builds it for GPUs of `compute_cap` and newer.
pub fn with_cuda(workspace: &Workspace, compute_cap: u32, name: &str) -> Result<Command> {
    let builder = builder(workspace, compute_cap);
    let mut others = OTHERS.into_iter();
    let other = others.find(|other| other.0 == name);
    let program = builder.other(other.context("there is no such program")?)?;
    let libraries = builder.needed(BTreeSet::from([program.clone()]))?;
    with_libraries(&program, &libraries)
}

fn with_libraries(program: &Path, libraries: &[String]) -> Result<Command> {
    let mut command = Command::new(program);
    command.env("LD_LIBRARY_PATH", Libraries::find(libraries).path()?);
    Ok(command)
}

/// Whether this machine has a CUDA driver with a GPU, be it one that fails.
pub fn has_gpu(workspace: &Workspace) -> Result<bool> {
    let program = probe::compile(&workspace.shell, &workspace.target.join("gpu-test"))?;
    Ok(!matches!(probe::ask(&program)?, Answer::NoGpu(_)))
}

/// What a bundle's `run` does. Returns the exit code.
pub fn run_bundle(arguments: &BundleArguments) -> Result<u8> {
    let folder = std::path::absolute(&arguments.folder).context("the bundle's folder")?;
    if let Some(Other::Program { name, arguments }) = &arguments.other {
        let program = bundle::other(&folder, name)?;
        let mut command = match build::needs_libraries(name) {
            true => with_libraries(&program, &bundle::manifest(&folder)?.libraries)?,
            false => Command::new(program),
        };
        return code(command.args(arguments));
    }
    if arguments.matrix.list {
        return list(&arguments.matrix);
    }
    let run = arguments.beside.join("run");
    let probe = || probe::ask(&folder.join(bundle::PROBE));
    let matrix = Matrix {
        arguments: &arguments.matrix,
        conditions: Conditions::find(&arguments.matrix, probe)?,
        programs: bundle::programs(&folder),
        manifest: bundle::manifest(&folder)?,
        folder: &folder,
        beside: &arguments.beside,
        // What comes before is what the script says of itself: --folder and --beside with their values.
        command: (run.display().to_string(), 6),
    };
    matrix.run()
}

/// Prints the rows' names, as on a machine with two GPUs.
fn list(arguments: &Arguments) -> Result<u8> {
    for cell in arguments.select(None)? {
        println!("{}", cell.name());
    }
    Ok(0)
}
