//! `test --cuda`: the facade's CUDA programs where there is no GPU, over the simulated driver.

use super::cell::Cell;
use super::conditions::Conditions;
use super::libraries::Libraries;
use super::manifest::Manifest;
use super::program::Program;
use super::row::{self, State};
use super::runner::{KERNELS, Runner};
use super::{COMPUTE_CAP, build, process, stand_ins, summary};
use crate::workspace::Workspace;
use crate::{kernels, progress};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// How long a program may take.
const LIMIT: Duration = Duration::from_secs(300);

/// Builds the programs as `gpu-test` does and runs them on each kind of CUDA device that Candle has.
pub fn run(workspace: &Workspace) -> Result<()> {
    let started = Instant::now();
    kernels::check(workspace)?;
    let target = workspace.target.join("gpu-test");
    let cells = Cell::simulated_library();
    let wanted: BTreeSet<Program> = cells.iter().flat_map(Cell::programs).collect();
    let mut manifest = Manifest::of(workspace);
    let programs = build::real(workspace, &target, COMPUTE_CAP, &wanted, &mut manifest)?;
    build::clippy(workspace, &target)?;
    let folder = target.join("stand-ins");
    let executables = programs.values().cloned().collect();
    let simulator = build::simulated_library(workspace, &target)?;
    stand_ins::make(&folder, &executables, &simulator)?;
    println!(
        "No GPU is used: {} is the simulated driver, and beside it are stand-ins for {}, with which Candle's\n\
         devices can be opened and plain copies made. The modules {KERNELS} are left out: they launch kernels, \
         which run on\nGPUs only.",
        workspace.short(&folder.join("libcuda.so.1")),
        manifest.libraries.join(", ")
    );
    process::heed_interrupts()?;
    let conditions = Conditions {
        libraries: Libraries {
            folders: vec![folder],
            missing: Vec::new(),
        },
        ..Conditions::default()
    };
    let work = tempfile::tempdir_in(&target).context("making a folder")?;
    let runner = Runner {
        programs: &programs,
        conditions: &conditions,
        work: work.path(),
        stress_seconds: 0,
        limit: LIMIT,
    };
    let mut rows = Vec::new();
    for cell in cells {
        let row = runner.run(cell)?;
        summary::print_row(&row);
        if row.state != State::Pass {
            print!("{}", row.log);
        }
        rows.push(row);
    }
    let failed = row::count(&rows, State::Fail);
    ensure!(failed == 0, "{failed} of {} rows failed", rows.len());
    eprintln!(
        "xtask: test --cuda: PASS in {}",
        progress::seconds(started.elapsed())
    );
    Ok(())
}
