//! `gpu-test`: the test matrix, on this machine or packed for another; and `test --cuda`: the
//! facade's CUDA programs where there is no GPU, over the simulated driver.

mod arguments;
mod build;
mod bundle;
mod cell;
mod conditions;
mod report;
mod runner;
mod stand_ins;

pub use arguments::{COMPUTE_CAP, InBundle, InPlace, OldestGpu, Passed, Usage};
pub use cell::{BENCH, BENCH_CANDLE, BENCH_SERVE, BENCHES, GENERATE, Program, SERVE, SERVER, SOAK};

use crate::workspace::{Workspace, code};
use crate::{display, kernels};
use anyhow::{Context, Result, ensure};
use arguments::{Arguments, Other};
use build::{Builder, Manifest};
use cell::{CUDA, Cell, Driver, State};
use conditions::{Conditions, Libraries, ask_probe, compile_probe};
use fs_err as fs;
use itertools::Itertools;
use report::Report;
use runner::{KERNELS, Runner};
use std::collections::BTreeSet;
use std::iter::once;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// Makes a bundle, or runs the matrix here. Returns the exit code.
pub fn run(workspace: &Workspace, asked: &InPlace) -> Result<u8> {
    let arguments = &asked.matrix;
    if arguments.list {
        return list(arguments);
    }
    let compute_cap = asked.oldest.compute_cap;
    if let Some(folder) = &asked.bundle {
        bundle::make(workspace, &std::path::absolute(folder)?, compute_cap)?;
        return Ok(0);
    }
    let builder = Builder::new(workspace, compute_cap);
    let probe = || ask_probe(&compile_probe(&workspace.shell, &builder.target)?);
    let conditions = Conditions::find(arguments, probe)?;
    let mut cells = arguments.select(conditions.gpu_count())?;
    cells.retain(|cell| conditions.obstacle(cell).is_none());
    let programs = cells.iter().flat_map(|cell| cell.programs.clone());
    let (real, simulated): (BTreeSet<_>, _) = programs.partition(|it| it.driver == Driver::Real);
    let mut programs = builder.programs(&real)?;
    let manifest = builder.manifest(&programs)?;
    if !simulated.is_empty() {
        programs.extend(build::simulated(workspace, &simulated)?);
    }
    let has_no_gpu = matches!(conditions.gpus, Some(Err((State::Skipped, _))));
    let runner = Runner::new(conditions, programs, &builder.target);
    let command = typed("cargo xtask gpu-test", 2);
    let code = run_rows(arguments, runner, &manifest, &builder.target, command)?;
    if has_no_gpu {
        let bundle = "cargo xtask gpu-test --bundle FOLDER";
        println!("To run the rows of the real driver elsewhere: {bundle}");
    }
    Ok(code)
}

/// What a bundle's script `run` does. Returns the exit code.
pub fn run_bundle(asked: &InBundle) -> Result<u8> {
    let folder = &std::path::absolute(&asked.folder).context("the bundle's folder")?;
    let (arguments, beside) = (&asked.matrix, &asked.beside);
    if let Some(Other::Program { name, passed }) = &asked.other {
        let program = bundle::other(folder, name)?;
        let needs_cuda = |it: &Program| it.name == name && it.features() == CUDA;
        let mut command = match bundle::OTHERS.iter().any(needs_cuda) {
            true => with_libraries(&program, &bundle::manifest(folder)?.libraries)?,
            false => Command::new(program),
        };
        return code(command.args(&passed.arguments));
    }
    if arguments.list {
        return list(arguments);
    }
    let conditions = Conditions::find(arguments, || ask_probe(&folder.join(bundle::PROBE)))?;
    let runner = Runner::new(conditions, bundle::programs(folder), folder);
    let manifest = bundle::manifest(folder)?;
    // The script itself says --folder and --beside with their values.
    let command = typed(&beside.join("run").to_string_lossy(), 6);
    run_rows(arguments, runner, &manifest, beside, command)
}

/// Runs and reports the rows, and returns the exit code. The report goes to `$OUT` or `beside`.
fn run_rows(
    arguments: &Arguments,
    mut runner: Runner,
    manifest: &Manifest,
    beside: &Path,
    command: String,
) -> Result<u8> {
    let started = Instant::now();
    let gpus = runner.conditions.gpu_count();
    let cells = arguments.select(gpus)?;
    runner.stress_seconds = arguments.stress_seconds;
    runner.limit_seconds = arguments.limit_seconds;
    runner.conditions.libraries = Libraries::find(&manifest.libraries);
    // Better found out now than after the last row that a report cannot be written.
    let out = std::env::var_os("OUT").filter(|out| !out.is_empty());
    let out = out.map_or_else(|| beside.into(), PathBuf::from);
    fs::create_dir_all(&out)?;
    let (markdown, json) = (out.join("report.md"), &arguments.json);
    for path in json.iter().chain([&markdown]) {
        fs::write(path, "")?;
    }
    let machine = report::machine(&command, &runner.conditions, manifest);
    let rows = runner.run(&cells)?;
    let (ended, asked) = (rows.len(), cells.len());
    let remark = match arguments.left_out(gpus) {
        _ if ended < asked => format!("Interrupted after {ended} of {asked} rows."),
        0 => String::new(),
        count => format!(
            "{count} rows for two devices were not asked for, as this machine has one GPU; \
             --devices 2 demands them."
        ),
    };
    let report = Report::new(machine, &rows, remark);
    fs::write(&markdown, report.markdown()?)?;
    if let Some(path) = json {
        fs::write(path, serde_json::to_string_pretty(&report)? + "\n")?;
    }
    report.print(started.elapsed(), &markdown.display().to_string());
    Ok(match ended == asked {
        true => report.exit_code(),
        // Interrupted, as a shell has it.
        false => 130,
    })
}

/// Builds programs as `gpu-test` does, and runs them on each kind of CUDA device of Candle.
pub fn without_gpu(workspace: &Workspace) -> Result<()> {
    let started = Instant::now();
    kernels::check(workspace)?;
    let builder = Builder::new(workspace, COMPUTE_CAP);
    let cells = Cell::listed().filter(|cell| cell.driver == Driver::SimulatedLibrary);
    let cells = cells.collect_vec();
    let programs = cells.iter().flat_map(|cell| cell.programs.clone());
    let programs = builder.programs(&programs.collect())?;
    builder.clippy()?;
    let folder = builder.target.join("stand-ins");
    let executables = programs.values().cloned().collect();
    let simulator = builder.simulated_library()?;
    stand_ins::make(&workspace.shell, &folder, &executables, &simulator)?;
    println!(
        "No GPU is used: {} is the simulated driver, and beside it are stand-ins for {}, with which Candle's\n\
         devices can be opened and plain copies made. The modules {KERNELS} are left out: they launch kernels, \
         which run on\nGPUs only.",
        workspace.short(&folder.join("libcuda.so.1")),
        stand_ins::needed(&workspace.shell, &executables)?.join(", ")
    );
    let mut conditions = Conditions::default();
    conditions.libraries.folders.push(folder);
    let runner = Runner::new(conditions, programs, &builder.target);
    let rows = runner.run(&cells)?;
    for row in rows.iter().filter(|row| row.state != State::Pass) {
        print!("{}", row.log);
    }
    let failed = report::count(&rows, State::Fail);
    ensure!(failed == 0, "{failed} of {} rows failed", rows.len());
    let taken = display::time(started.elapsed());
    eprintln!("xtask: test --cuda: PASS in {taken}");
    Ok(())
}

/// The command line as one would type it, with `program` in place of the first words.
fn typed(program: &str, words: usize) -> String {
    let words = std::env::args_os().skip(words);
    let words = words.map(|word| word.to_string_lossy().into_owned());
    once(program.to_owned()).chain(words).join(" ")
}

/// Prints the rows' names, as on a machine with two GPUs.
fn list(arguments: &Arguments) -> Result<u8> {
    for cell in arguments.select(None)? {
        println!("{}", cell.name);
    }
    Ok(0)
}

/// A command that runs a program on the real driver; builds it for GPUs of `compute_cap` and newer.
pub fn with_cuda(workspace: &Workspace, compute_cap: u32, program: Program) -> Result<Command> {
    let builder = Builder::new(workspace, compute_cap);
    let programs = builder.programs(&BTreeSet::from([program]))?;
    let program = programs.into_values().next().context("it was not built")?;
    let libraries = stand_ins::needed(&workspace.shell, &BTreeSet::from([program.clone()]))?;
    with_libraries(&program, &libraries)
}

fn with_libraries(program: &Path, libraries: &[String]) -> Result<Command> {
    let mut command = Command::new(program);
    command.env("LD_LIBRARY_PATH", Libraries::find(libraries).path()?);
    Ok(command)
}

/// Whether this machine has a CUDA driver with a GPU, be it one that fails.
pub fn has_gpu(workspace: &Workspace) -> Result<bool> {
    let program = compile_probe(&workspace.shell, &workspace.target.join("gpu-test"))?;
    Ok(!matches!(ask_probe(&program)?, Err((State::Skipped, _))))
}
