//! The matrix on one machine: which rows are asked for, running them, and what is told of it.

use super::arguments::Arguments;
use super::cell::{Cell, Driver};
use super::conditions::Conditions;
use super::facts::Facts;
use super::manifest::Manifest;
use super::probe::Answer;
use super::program::Programs;
use super::report::Report;
use super::row::Row;
use super::runner::Runner;
use super::{process, row, selection, summary};
use crate::files;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// The exit code of what was interrupted, as a shell has it.
const INTERRUPTED: u8 = 130;

/// The rows that are asked for here.
pub struct Plan {
    /// What the probe answered, if a row of the real driver could be asked for.
    pub gpu: Option<Answer>,
    /// The rows.
    pub cells: Vec<Cell>,
    /// How many more there would be if this machine had two GPUs.
    left_out: usize,
}

impl Plan {
    /// Chooses the rows for a machine on which `probe` answers.
    ///
    /// # Errors
    ///
    /// A usage error if there are none.
    pub fn make(arguments: &Arguments, probe: impl FnOnce() -> Result<Answer>) -> Result<Self> {
        // A usage error is one on every machine, and is found before anything is started.
        let most = selection::select(arguments, None)?;
        let needs_gpu = most.iter().any(|cell| cell.driver == Driver::Real);
        let gpu = needs_gpu.then(probe).transpose()?;
        let count = gpu.as_ref().and_then(Answer::gpu).map(|gpu| gpu.count);
        Ok(Self {
            cells: selection::select(arguments, count)?,
            left_out: selection::left_out(arguments, count),
            gpu,
        })
    }

    /// What the report must say besides its rows.
    fn remark(&self) -> Option<String> {
        (self.left_out > 0).then(|| {
            format!(
                "{} rows for two devices were not asked for, as this machine has one GPU; --devices 2 demands them.",
                self.left_out
            )
        })
    }
}

/// All that is needed to run the rows.
pub struct Matrix<'a> {
    /// The command line.
    pub arguments: &'a Arguments,
    /// The rows.
    pub plan: Plan,
    /// What the machine has.
    pub conditions: Conditions,
    /// The executables.
    pub programs: Programs,
    /// What their build says of itself.
    pub manifest: Manifest,
    /// Where temporary files go.
    pub folder: &'a Path,
    /// Where the report goes.
    pub report_folder: PathBuf,
    /// The command line as one would type it.
    pub command: String,
}

impl Matrix<'_> {
    /// Runs the rows, prints and writes what came of them, and answers the exit code.
    pub fn run(self) -> Result<u8> {
        let started = Instant::now();
        // Better found out now than after the last row.
        files::make(&self.report_folder)?;
        let written_to = self.report_folder.join("report.md");
        write(&written_to, "")?;
        if let Some(path) = &self.arguments.json {
            write(path, "")?;
        }
        process::heed_interrupts()?;
        files::make(self.folder)?;
        let work = tempfile::tempdir_in(self.folder).context("making a folder")?;
        let runner = Runner {
            programs: &self.programs,
            conditions: &self.conditions,
            work: work.path(),
            stress_seconds: self.arguments.stress_seconds,
            limit: Duration::from_secs(self.arguments.limit_seconds),
        };
        let facts = Facts::gather(self.command, &self.conditions, &self.manifest);
        let rows = run_all(&runner, &self.plan.cells)?;
        let is_whole = rows.len() == self.plan.cells.len();
        let report = Report {
            facts,
            remark: match is_whole {
                true => self.plan.remark(),
                false => Some(format!(
                    "Interrupted after {} of {} rows.",
                    rows.len(),
                    self.plan.cells.len()
                )),
            },
            rows,
        };
        write(&written_to, &report.markdown())?;
        if let Some(path) = &self.arguments.json {
            write(path, &report.json()?)?;
        }
        summary::print_end(
            &report,
            started.elapsed(),
            &written_to.display().to_string(),
        );
        Ok(match is_whole {
            true => row::exit_code(&report.rows),
            false => INTERRUPTED,
        })
    }
}

/// Rows of the simulated driver that run side by side.
const SIMULATED_SIDES: usize = 2;

/// Runs `cells`: those of the real driver one after another, and beside them those of the simulated driver. What a GPU is
/// asked does not depend on what the simulator does meanwhile. Returns the rows in the order of `cells`, without those that
/// an interrupt kept from ending.
fn run_all(runner: &Runner<'_>, cells: &[Cell]) -> Result<Vec<Row>> {
    let queues = Driver::ALL.map(|driver| {
        let cells = cells.iter().filter(move |cell| cell.driver == driver);
        Mutex::new(cells)
    });
    let run = |queue: usize| {
        let mut rows = Vec::new();
        while let Some(cell) = next(&queues[queue]) {
            // A machine that fails at files fails the whole run, and the other rows with it.
            let row = runner.run(*cell).inspect_err(|_| process::interrupt())?;
            if process::is_interrupted() {
                break;
            }
            summary::print_row(&row);
            rows.push(row);
        }
        Ok(rows)
    };
    let sides = Driver::ALL.iter().enumerate().flat_map(|(queue, driver)| {
        let count = match driver {
            Driver::Simulated => SIMULATED_SIDES,
            _ => 1,
        };
        std::iter::repeat_n(queue, count)
    });
    let rows: Result<Vec<Vec<Row>>> = thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> = sides.map(|queue| scope.spawn(move || run(queue))).collect();
        let joined = threads.into_iter();
        joined
            .map(|thread| thread.join().expect("rows do not panic"))
            .collect()
    });
    let mut rows = rows?.concat();
    rows.sort_by_key(|row| cells.iter().position(|cell| *cell == row.cell));
    Ok(rows)
}

/// The next cell of a queue.
fn next<T>(queue: &Mutex<impl Iterator<Item = T>>) -> Option<T> {
    let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
    queue.next()
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}
