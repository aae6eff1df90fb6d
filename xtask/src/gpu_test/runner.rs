//! Runs the programs of a cell, and judges them.

use super::cell::{Cell, Driver, Suite};
use super::conditions::Conditions;
use super::process::{self, End};
use super::program::{Program, Programs};
use super::row::{Row, State};
use super::sanitizer;
use crate::files;
use crate::tests::{self, Counts};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How the names of the facade's tests begin that launch kernels. Simulated devices have none, so these are left
/// out where a CUDA program runs on one.
pub const KERNELS: &str = "kernels::";
/// How the names of the facade's tests begin that have the simulated library's calls fail, which a real driver cannot.
const SIMULATED: &str = "simulated::";

/// What all rows have in common.
pub struct Runner<'a> {
    /// The executables.
    pub programs: &'a Programs,
    /// What the machine has.
    pub conditions: &'a Conditions,
    /// A folder for what the programs write, which stays if this process is interrupted.
    pub work: &'a Path,
    /// For how many seconds the longest stress test goes on.
    pub stress_seconds: u64,
    /// How long a program may take besides.
    pub limit: Duration,
}

/// What one program did.
struct Outcome {
    counts: Counts,
    /// Why it did not pass.
    complaint: Option<String>,
    /// What else is to be said.
    remark: Option<String>,
    log: String,
}

impl Runner<'_> {
    /// Runs a cell's programs one after another, each of them whatever became of the one before.
    ///
    /// # Errors
    ///
    /// If this machine fails at files; a program that fails is a row's failure.
    pub fn run(&self, cell: Cell) -> Result<Row> {
        if let Some((state, reason)) = self.conditions.obstacle(&cell) {
            return Ok(Row::not_run(cell, state, reason));
        }
        let started = Instant::now();
        let mut row = Row::not_run(cell, State::Pass, String::new());
        let mut notes = Vec::new();
        for program in cell.programs() {
            let outcome = self.program(&cell, &program)?;
            row.passed += outcome.counts.passed;
            row.failed += outcome.counts.failed;
            row.log += &format!("==== {} ====\n{}", program.target, outcome.log);
            if outcome.complaint.is_some() {
                row.state = State::Fail;
            }
            let said = outcome.complaint.into_iter().chain(outcome.remark);
            notes.extend(said.map(|said| format!("{}: {said}", program.target)));
        }
        row.time = started.elapsed();
        row.note = notes.join("; ");
        Ok(row)
    }

    fn program(&self, cell: &Cell, program: &Program) -> Result<Outcome> {
        // What a program left behind may still write to its own folder, so each has one.
        let folder = tempfile::tempdir_in(self.work).context("making a folder")?;
        let folder = folder.path();
        let log = folder.join("log");
        let seconds = self.limit + Duration::from_secs(cell.stress_seconds(self.stress_seconds));
        let mut command = self.command(cell, program, folder)?;
        let output = fs::File::create(&log).with_context(|| format!("making {}", log.display()))?;
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        let end = process::run(&mut command, seconds);
        let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
        let counts = tests::count(&text);
        let summary = sanitizer::summary(&text).filter(|_| cell.sanitized);
        let complaint = match end {
            Err(error) => Some(format!("{error:#}")),
            Ok(End::Stopped) => Some(format!("stopped after {} s", seconds.as_secs())),
            Ok(End::Exited(status)) if !status.success() => Some(failure(status, cell, counts)),
            Ok(End::Exited(_)) if counts.passed == 0 => Some("no test passed".to_owned()),
            Ok(End::Exited(_)) if !self.opened_driver(cell, folder)? => {
                Some(format!("it did not open the {} driver", cell.driver.word()))
            }
            Ok(End::Exited(_)) if cell.sanitized && summary.is_none() => {
                Some("compute-sanitizer gave no summary".to_owned())
            }
            Ok(End::Exited(_)) => None,
        };
        Ok(Outcome {
            counts,
            complaint,
            remark: summary.map(str::to_owned),
            log: text,
        })
    }

    fn command(&self, cell: &Cell, program: &Program, folder: &Path) -> Result<Command> {
        let executable = self
            .programs
            .get(program)
            .with_context(|| format!("{} was not built", program.file_name()))?;
        let mut command = match &self.conditions.sanitizer {
            Some(sanitizer) if cell.sanitized => sanitizer::command(sanitizer, executable),
            _ => Command::new(executable),
        };
        command.current_dir(folder);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("CUDA_VMM_") {
                command.env_remove(name);
            }
        }
        command.envs(cell.variables(self.stress_seconds));
        match (cell.driver, cell.suite) {
            (Driver::SimulatedLibrary, _) => command.args(["--skip", KERNELS]),
            (Driver::Real, Suite::Facade) => command.args(["--skip", SIMULATED]),
            _ => &mut command,
        };
        if cell.driver.is_library() {
            // The dynamic loader writes down what each process opens.
            command
                .env("LD_DEBUG", "files")
                .env("LD_DEBUG_OUTPUT", opened(folder).join("process"));
            files::make(&opened(folder))?;
        }
        if cell.driver.is_library() && cell.suite == Suite::Facade {
            command.env("LD_LIBRARY_PATH", self.conditions.libraries.path()?);
        }
        Ok(command)
    }

    /// Whether the program opened the driver that it should, where that is a library.
    fn opened_driver(&self, cell: &Cell, folder: &Path) -> Result<bool> {
        if !cell.driver.is_library() {
            return Ok(true);
        }
        let opened = opened_drivers(folder)?;
        let is_ours = |path: &PathBuf| {
            let folders = &self.conditions.libraries.folders;
            cell.driver == Driver::Real || folders.iter().any(|folder| path.starts_with(folder))
        };
        Ok(!opened.is_empty() && opened.iter().all(is_ours))
    }
}

/// Where the dynamic loader writes.
fn opened(folder: &Path) -> PathBuf {
    folder.join("opened")
}

/// The libraries of CUDA drivers that processes of the program initialised.
fn opened_drivers(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut drivers = Vec::new();
    for (_, path) in files::entries(&opened(folder))? {
        let text = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        let text = String::from_utf8_lossy(&text);
        let initialised = text.lines().filter_map(|line| {
            let (_, library) = line.split_once("calling init:")?;
            library
                .contains("libcuda.so.1")
                .then(|| library.trim().into())
        });
        drivers.extend(initialised);
    }
    Ok(drivers)
}

/// What to say of a program that ended without success.
fn failure(status: ExitStatus, cell: &Cell, counts: Counts) -> String {
    match status.code() {
        Some(sanitizer::ERRORS) if cell.sanitized => "compute-sanitizer found errors".to_owned(),
        Some(code) => format!("exit code {code}, {} tests failed", counts.failed),
        // The status names the signal.
        None => status.to_string(),
    }
}
