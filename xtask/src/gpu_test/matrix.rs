//! The matrix on one machine: running the rows that are asked for, and telling what came of them.

use super::arguments::Arguments;
use super::build::Manifest;
use super::cell::{Cell, Driver};
use super::conditions::{Conditions, Libraries};
use super::process;
use super::report::{self, Report};
use super::runner::{Programs, Row, Runner};
use anyhow::{Context, Result};
use fs_err as fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

/// The exit code of what was interrupted, as a shell has it.
const INTERRUPTED: u8 = 130;

/// All that is needed to run the rows.
pub struct Matrix<'a> {
    pub arguments: &'a Arguments,
    /// What the machine has; the libraries are still to be found.
    pub conditions: Conditions,
    pub programs: Programs,
    pub manifest: Manifest,
    /// Where temporary files go.
    pub folder: &'a Path,
    /// Where the report goes if `$OUT` names no folder.
    pub beside: &'a Path,
    /// The command line as one would type it: the program, and how many of this one's arguments are left out.
    pub command: (String, usize),
}

impl Matrix<'_> {
    /// Runs the rows, prints and writes what came of them, and returns the exit code.
    pub fn run(mut self) -> Result<u8> {
        let started = Instant::now();
        let gpus = self.conditions.gpus();
        let cells = self.arguments.select(gpus)?;
        self.conditions.libraries = Libraries::find(&self.manifest.libraries);
        // Better found out now than after the last row that a report cannot be written.
        let out = std::env::var_os("OUT").filter(|out| !out.is_empty());
        let out = out.map_or_else(|| self.beside.into(), PathBuf::from);
        fs::create_dir_all(&out)?;
        let markdown = out.join("report.md");
        let json = self.arguments.json.as_ref();
        for path in json.into_iter().chain([&markdown]) {
            fs::write(path, "")?;
        }
        process::heed_interrupts()?;
        fs::create_dir_all(self.folder)?;
        let work = tempfile::tempdir_in(self.folder).context("making a folder")?;
        let runner = Runner {
            programs: &self.programs,
            conditions: &self.conditions,
            work: work.path(),
            stress_seconds: self.arguments.stress_seconds,
            limit_seconds: self.arguments.limit_seconds,
        };
        let (mut typed, skipped) = self.command;
        for word in std::env::args_os().skip(skipped) {
            typed = typed + " " + &word.to_string_lossy();
        }
        let mut report = Report::new(typed, &self.conditions, &self.manifest);
        report.rows = run_all(&runner, &cells)?;
        let (ended, asked) = (report.rows.len(), cells.len());
        let left_out = self.arguments.left_out(gpus);
        report.remark = if ended < asked {
            Some(format!("Interrupted after {ended} of {asked} rows."))
        } else {
            (left_out > 0).then(|| format!(
                "{left_out} rows for two devices were not asked for, as this machine has one GPU; --devices 2 demands them."
            ))
        };
        fs::write(&markdown, report.markdown())?;
        if let Some(path) = json {
            fs::write(path, report.json()?)?;
        }
        report.print(started.elapsed(), &markdown.display().to_string());
        let is_whole = ended == asked;
        Ok(if is_whole {
            report.exit_code()
        } else {
            INTERRUPTED
        })
    }
}

/// Runs `cells`: those of the real driver one after another, and beside them two at a time of the simulated driver. What a GPU
/// is asked does not depend on what the simulator does meanwhile. Returns the rows in the order of `cells`, without those that
/// an interrupt kept from ending.
pub fn run_all(runner: &Runner<'_>, cells: &[Cell]) -> Result<Vec<Row>> {
    let [real, simulated, library] = Driver::ALL.map(|driver| {
        let mut mine = cells.to_vec();
        mine.retain(|cell| cell.driver == driver);
        Mutex::new(mine.into_iter())
    });
    let run = |queue: &Mutex<std::vec::IntoIter<Cell>>| {
        let mut rows = Vec::new();
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        while let Some(cell) = next() {
            // A machine that fails at files fails the whole run, and the other rows with it.
            let row = runner.run(cell).inspect_err(|_| process::interrupt())?;
            if process::is_interrupted() {
                break;
            }
            report::print_row(&row);
            rows.push(row);
        }
        Ok(rows)
    };
    let rows: Result<Vec<Vec<Row>>> = thread::scope(|scope| {
        let run = &run;
        let start = |queue| scope.spawn(move || run(queue));
        let threads = [&real, &library, &simulated, &simulated].map(start);
        let join = |thread: thread::ScopedJoinHandle<_>| thread.join().expect("rows do not panic");
        threads.map(join).into_iter().collect()
    });
    let mut rows = rows?.concat();
    rows.sort_by_key(|row| cells.iter().position(|cell| *cell == row.cell));
    Ok(rows)
}
