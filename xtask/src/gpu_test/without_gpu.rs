//! `test --cuda`: the facade's CUDA programs where there is no GPU, over the simulated driver.

use super::build::Builder;
use super::cell::{Cell, State};
use super::conditions::Conditions;
use super::runner::{KERNELS, Runner};
use super::{COMPUTE_CAP, report, stand_ins};
use crate::workspace::Workspace;
use crate::{display, kernels};
use anyhow::{Result, ensure};
use std::time::Instant;

/// Builds the programs as `gpu-test` does and runs them on each kind of CUDA device that Candle has.
pub fn run(workspace: &Workspace) -> Result<()> {
    let started = Instant::now();
    kernels::check(workspace)?;
    let builder = Builder::new(workspace, COMPUTE_CAP);
    let cells = Cell::simulated_library();
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
