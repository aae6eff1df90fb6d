//! Runs the programs of a cell, and judges them.

use super::cell::{Cell, Driver, Program, State, Suite};
use super::conditions::{Conditions, SANITIZER_ERRORS};
use super::process;
use crate::files;
use crate::tests::{self as tally, Counts};
use anyhow::{Context, Result};
use fs_err as fs;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How the names of the facade's tests begin that launch kernels. Simulated devices have none, so these are left out when a
/// CUDA program runs on one.
pub const KERNELS: &str = "kernels::";
/// How the names of the facade's tests begin that have the simulated library's calls fail, which a real driver cannot.
const SIMULATED: &str = "simulated::";

/// A row of the report: a cell, and what came of it.
#[derive(Clone, Debug)]
pub struct Row {
    pub cell: Cell,
    pub state: State,
    pub time: Duration,
    pub counts: Counts,
    /// Why it did not pass, or what else is to be said.
    pub note: String,
    pub log: String,
}

impl Row {
    pub fn not_run(cell: Cell, state: State, note: String) -> Self {
        Self {
            cell,
            state,
            time: Duration::ZERO,
            counts: Counts::default(),
            note,
            log: String::new(),
        }
    }
}

/// Where the executables of programs are.
pub type Programs = BTreeMap<Program, PathBuf>;

/// What all rows have in common.
pub struct Runner<'a> {
    pub programs: &'a Programs,
    pub conditions: &'a Conditions,
    /// A folder for what the programs write, which stays if this process is interrupted.
    pub work: &'a Path,
    /// For how many seconds the longest stress test goes on.
    pub stress_seconds: u64,
    /// How many seconds a program may take besides.
    pub limit_seconds: u64,
}

impl Runner<'_> {
    /// Runs a cell's programs one after another, each of them whatever became of the one before.
    /// It fails only if this machine fails at files; a program that fails is a row's failure.
    pub fn run(&self, cell: Cell) -> Result<Row> {
        if let Some((state, reason)) = self.conditions.obstacle(&cell) {
            return Ok(Row::not_run(cell, state, reason));
        }
        let started = Instant::now();
        let mut row = Row::not_run(cell, State::Pass, String::new());
        let mut notes = Vec::new();
        for program in cell.programs() {
            notes.extend(self.program(&program, &mut row)?);
        }
        row.time = started.elapsed();
        row.note = notes.join("; ");
        Ok(row)
    }

    /// Runs a program, enters into the row what it did, and returns what is to be said of it.
    fn program(&self, program: &Program, row: &mut Row) -> Result<Vec<String>> {
        let cell = row.cell;
        // What a program left behind may still write to its own folder, so each has one.
        let folder = tempfile::tempdir_in(self.work).context("making a folder")?;
        let (log, opened) = (folder.path().join("log"), folder.path().join("opened"));
        fs::create_dir(&opened)?;
        let output = fs::File::create(&log)?.into_file();
        let mut command = self.command(&cell, program, &opened)?;
        command.current_dir(folder.path()).stdin(Stdio::null());
        command.stdout(output.try_clone()?).stderr(output);
        let seconds = self.limit_seconds + cell.stress_seconds(self.stress_seconds);
        let end = process::run(&mut command, Duration::from_secs(seconds));

        let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
        let counts = tally::count(&text);
        let summary = sanitizer_summary(&text).filter(|_| cell.sanitized);
        let complaint = match end {
            Err(error) => Some(format!("{error:#}")),
            Ok(None) => Some(format!("stopped after {seconds} s")),
            Ok(Some(status)) if !status.success() => Some(failure(status, &cell, counts)),
            Ok(_) if counts.passed == 0 => Some("no test passed".to_owned()),
            Ok(_) if !self.opened_driver(&cell, &opened)? => {
                Some(format!("it did not open the {} driver", cell.driver.word()))
            }
            Ok(_) if cell.sanitized && summary.is_none() => {
                Some("compute-sanitizer gave no summary".to_owned())
            }
            Ok(_) => None,
        };
        if complaint.is_some() {
            row.state = State::Fail;
        }
        row.counts.passed += counts.passed;
        row.counts.failed += counts.failed;
        row.log += &format!("==== {} ====\n{text}", program.target);
        let said = complaint.into_iter().chain(summary.map(str::to_owned));
        let said = said.map(|said| format!("{}: {said}", program.target));
        Ok(said.collect())
    }

    fn command(&self, cell: &Cell, program: &Program, opened: &Path) -> Result<Command> {
        let executable = self.programs.get(program);
        let executable =
            executable.with_context(|| format!("{} was not built", program.file_name()))?;
        let mut command = match cell.sanitized {
            true => self.conditions.sanitized(executable),
            false => Command::new(executable),
        };
        let variables = std::env::vars_os().map(|(name, _)| name);
        for name in variables.filter(|name| name.to_string_lossy().starts_with("CUDA_VMM_")) {
            command.env_remove(name);
        }
        command.envs(cell.variables(self.stress_seconds));
        match (cell.driver, cell.suite) {
            (Driver::SimulatedLibrary, _) => command.args(["--skip", KERNELS]),
            (Driver::Real, Suite::Facade) => command.args(["--skip", SIMULATED]),
            _ => &mut command,
        };
        if cell.driver.is_library() {
            // The dynamic loader writes down what each process opens.
            command.env("LD_DEBUG", "files");
            command.env("LD_DEBUG_OUTPUT", opened.join("process"));
            if cell.suite == Suite::Facade {
                command.env("LD_LIBRARY_PATH", self.conditions.libraries.path()?);
            }
        }
        Ok(command)
    }

    /// Whether the program opened the driver that it should, if that is a library.
    fn opened_driver(&self, cell: &Cell, opened: &Path) -> Result<bool> {
        let mut drivers = Vec::new();
        for path in files::entries(opened)? {
            let text = String::from_utf8_lossy(&fs::read(&path)?).into_owned();
            let pairs = text.lines().map(|line| line.split_once("calling init:"));
            let libraries = pairs
                .flatten()
                .map(|(_, library)| PathBuf::from(library.trim()));
            let is_driver = |library: &PathBuf| library.to_string_lossy().contains("libcuda.so.1");
            drivers.extend(libraries.filter(is_driver));
        }
        let folders = &self.conditions.libraries.folders;
        let is_ours = |path: &PathBuf| folders.iter().any(|folder| path.starts_with(folder));
        Ok(match cell.driver {
            Driver::Simulated => true,
            Driver::Real => !drivers.is_empty(),
            Driver::SimulatedLibrary => !drivers.is_empty() && drivers.iter().all(is_ours),
        })
    }
}

/// What to say of a program that ended without success.
fn failure(status: ExitStatus, cell: &Cell, counts: Counts) -> String {
    match status.code() {
        Some(SANITIZER_ERRORS) if cell.sanitized => "compute-sanitizer found errors".to_owned(),
        Some(code) => format!("exit code {code}, {} tests failed", counts.failed),
        // The status names the signal.
        None => status.to_string(),
    }
}

/// The memory checker's own summary, in what the program and it have printed.
fn sanitizer_summary(text: &str) -> Option<&str> {
    let mut lines = text.lines().rev();
    lines.find_map(|line| line.find("ERROR SUMMARY").map(|start| line[start..].trim()))
}
