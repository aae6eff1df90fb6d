//! `test --cuda`: the facade's CUDA programs where there is no GPU, over the simulated driver.

use super::cell::{Cell, State};
use super::conditions::{Conditions, Libraries};
use super::report;
use super::runner::{KERNELS, Runner};
use super::{COMPUTE_CAP, matrix, process, stand_ins};
use crate::display;
use crate::kernels;
use crate::workspace::Workspace;
use anyhow::{Context, Result, ensure};
use std::time::Instant;

/// Builds the programs as `gpu-test` does and runs them on each kind of CUDA device that Candle has.
pub fn run(workspace: &Workspace) -> Result<()> {
    let started = Instant::now();
    kernels::check(workspace)?;
    let builder = super::builder(workspace, COMPUTE_CAP);
    let cells = Cell::simulated_library();
    let programs = builder.programs(&cells.iter().flat_map(Cell::programs).collect())?;
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
        builder.needed(executables)?.join(", ")
    );
    process::heed_interrupts()?;
    let conditions = Conditions {
        libraries: Libraries {
            folders: vec![folder],
            ..Libraries::default()
        },
        ..Conditions::default()
    };
    let work = tempfile::tempdir_in(&builder.target).context("making a folder")?;
    let runner = Runner {
        programs: &programs,
        conditions: &conditions,
        work: work.path(),
        stress_seconds: 0,
        limit_seconds: 300,
    };
    let rows = matrix::run_all(&runner, &cells)?;
    for row in rows.iter().filter(|row| row.state != State::Pass) {
        print!("{}", row.log);
    }
    let failed = report::count(&rows, State::Fail);
    ensure!(failed == 0, "{failed} of {} rows failed", rows.len());
    eprintln!(
        "xtask: test --cuda: PASS in {}",
        display::time(started.elapsed())
    );
    Ok(())
}
