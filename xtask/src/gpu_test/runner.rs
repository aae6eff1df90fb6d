//! Runs rows: the programs of a cell, one after another and for a limited time, and judges them.

use super::cell::{Cell, Driver, HOST_KERNELS, Program, Programs, State};
use super::conditions::{Conditions, SANITIZER_ERRORS};
use super::report::{self, Row};
use crate::files::matching;
use crate::tests::{self as tally, Counts};
use anyhow::{Context, Result};
use fs_err as fs;
use itertools::Itertools;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use strum::IntoEnumIterator;
use wait_timeout::ChildExt;

/// How tests of the facade begin that launch kernels, which simulated devices do not have.
pub const KERNELS: &str = "kernels::";
/// How tests of the facade begin in which calls of the simulated library fail.
const SIMULATED: &str = "simulated::";

pub struct Runner {
    programs: Programs,
    pub conditions: Conditions,
    /// Where temporary files go, which stay if this process is interrupted.
    folder: PathBuf,
    pub stress_seconds: u64,
    /// How many seconds a program may take besides.
    pub limit_seconds: u64,
}

/// A simulated program holds up no GPU, and is slow on a machine that does other work.
const SIMULATED_LIMITS: u64 = 4;

impl Runner {
    pub fn new(conditions: Conditions, programs: Programs, folder: &Path) -> Self {
        Self {
            programs,
            conditions,
            folder: folder.to_owned(),
            stress_seconds: 0,
            limit_seconds: 300,
        }
    }

    /// Runs `cells`: those of the real driver one after another, beside them two at a time of the
    /// simulated driver. Returns the rows in this order, without those that an interrupt cuts off.
    pub fn run(&self, cells: &[Cell]) -> Result<Vec<Row>> {
        // An interrupt stops the processes that run, and lets no other start; this one goes on.
        ctrlc::set_handler(interrupt).context("no handler for interrupts could be set")?;
        fs::create_dir_all(&self.folder)?;
        let work = tempfile::tempdir_in(&self.folder).context("making a folder")?;
        let queue = |driver| {
            let mine = cells.iter().filter(move |cell| cell.driver == driver);
            (driver, Mutex::new(mine))
        };
        let queues: BTreeMap<_, _> = Driver::iter().map(queue).collect();
        let run = |driver: Driver| {
            let mut rows = Vec::new();
            let next = || queues[&driver].lock().expect("no panic").next();
            while let Some(cell) = next() {
                // A machine that fails at files fails the whole run, and the other rows with it.
                let row = self.row(cell, work.path());
                let row = row.inspect_err(|_| interrupt())?;
                if running().is_none() {
                    break;
                }
                report::print_row(&row);
                rows.push(row);
            }
            Ok(rows)
        };
        let rows: Result<Vec<Vec<Row>>> = thread::scope(|scope| {
            let start = |driver| scope.spawn(move || run(driver));
            let threads = Driver::iter().chain([Driver::Simulated]).map(start);
            let join = |thread: thread::ScopedJoinHandle<_>| thread.join().expect("no panic");
            threads.collect_vec().into_iter().map(join).collect()
        });
        let mut rows = rows?.concat();
        rows.sort_by_key(|row| cells.iter().position(|cell| *cell == row.cell));
        Ok(rows)
    }

    /// Runs a cell's programs. One that fails fails the row; only the machine's files fail the run.
    fn row(&self, cell: &Cell, work: &Path) -> Result<Row> {
        let obstacle = self.conditions.obstacle(cell);
        let is_due = obstacle.is_none();
        let (state, note) = obstacle.unwrap_or((State::Pass, String::new()));
        let mut row = Row {
            cell: cell.clone(),
            state,
            seconds: 0.0,
            counts: Counts::default(),
            note,
            log: String::new(),
        };
        let (started, mut notes) = (Instant::now(), Vec::new());
        for program in cell.programs.iter().filter(|_| is_due) {
            notes.extend(self.program(program, &mut row, work)?);
            row.seconds = (started.elapsed().as_secs_f64() * 1000.0).round() / 1000.0;
            row.note = notes.join("; ");
        }
        Ok(row)
    }

    /// Runs a program, enters into the row what it did, and returns what is to be said of it.
    fn program(&self, program: &Program, row: &mut Row, work: &Path) -> Result<Vec<String>> {
        let cell = &row.cell.clone();
        // What a program left behind may still write to its own folder, so each has one.
        let folder = tempfile::tempdir_in(work).context("making a folder")?;
        let (log, opened) = (folder.path().join("log"), folder.path().join("opened"));
        fs::create_dir(&opened)?;
        let output = fs::File::create(&log)?.into_file();
        let mut command = self.command(cell, program, &opened)?;
        command.current_dir(folder.path()).stdin(Stdio::null());
        command.stdout(output.try_clone()?).stderr(output);
        let limit_seconds = match cell.driver {
            Driver::Real => self.limit_seconds,
            Driver::Simulated | Driver::SimulatedLibrary => SIMULATED_LIMITS * self.limit_seconds,
        };
        let seconds = limit_seconds + cell.stress_seconds(self.stress_seconds);
        let end = run_for(&mut command, Duration::from_secs(seconds));

        let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
        let counts = tally::count(&text);
        // The memory checker's own, in what the program and it have printed.
        let is_checked = cell.is_sanitized();
        let mut lines = text.lines().rev().filter(|_| is_checked);
        let summary = lines.find_map(|line| Some(line[line.find("ERROR SUMMARY")?..].trim()));
        let complaint = match end {
            Err(error) => Some(format!("{error:#}")),
            Ok(None) => Some(format!("stopped after {seconds} s")),
            Ok(Some(status)) if !status.success() => Some(match status.code() {
                Some(SANITIZER_ERRORS) if is_checked => "compute-sanitizer found errors".to_owned(),
                Some(code) => format!("exit code {code}, {} tests failed", counts.failed),
                // The status names the signal.
                None => status.to_string(),
            }),
            Ok(_) if counts.passed == 0 => Some("no test passed".to_owned()),
            Ok(_) if program.name != HOST_KERNELS && !self.opened_driver(cell, &opened)? => {
                Some(format!("it did not open the {} driver", cell.driver))
            }
            Ok(_) if is_checked && summary.is_none() => {
                Some("compute-sanitizer gave no summary".to_owned())
            }
            Ok(_) => None,
        };
        if complaint.is_some() {
            row.state = State::Fail;
        }
        row.counts.passed += counts.passed;
        row.counts.failed += counts.failed;
        row.log += &format!("==== {} ====\n{text}", program.name);
        let said = complaint.into_iter().chain(summary.map(str::to_owned));
        let said = said.map(|said| format!("{}: {said}", program.name));
        Ok(said.collect())
    }

    fn command(&self, cell: &Cell, program: &Program, opened: &Path) -> Result<Command> {
        let absent = || format!("{} was not built", program.place());
        let executable = self.programs.get(program).with_context(absent)?;
        let mut command = match cell.is_sanitized() {
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
            (Driver::Real, "facade") => command.args(["--skip", SIMULATED]),
            _ => &mut command,
        };
        if cell.opens_library() {
            // The dynamic loader writes down what each process opens.
            command.env("LD_DEBUG", "files");
            command.env("LD_DEBUG_OUTPUT", opened.join("process"));
            if cell.suite == "facade" {
                command.env("LD_LIBRARY_PATH", self.conditions.libraries.path()?);
            }
        }
        Ok(command)
    }

    /// Whether the program opened the driver that it should, if that is a library.
    fn opened_driver(&self, cell: &Cell, opened: &Path) -> Result<bool> {
        let mut drivers = Vec::new();
        for path in matching(&format!("{}/*", opened.display())) {
            let text = String::from_utf8_lossy(&fs::read(path)?).into_owned();
            let lines = text.lines();
            let loaded = lines.filter_map(|line| line.split_once("calling init:"));
            let loaded = loaded.map(|(_, library)| PathBuf::from(library.trim()));
            drivers.extend(loaded.filter(|it| it.to_string_lossy().contains("libcuda.so.1")));
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

/// The processes that run now; nothing once an interrupt came.
static RUNNING: Mutex<Option<BTreeSet<u32>>> = Mutex::new(Some(BTreeSet::new()));

fn running() -> MutexGuard<'static, Option<BTreeSet<u32>>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

fn interrupt() {
    running().take().into_iter().flatten().for_each(stop_group);
}

/// Runs `command` in a process group of its own; no status if it was stopped at the `limit`.
///
/// It must write to files only: a pipe would stay open while a process that it left behind lives.
fn run_for(command: &mut Command, limit: Duration) -> Result<Option<ExitStatus>> {
    let mut child = {
        // An interrupt in between would miss the new process.
        let mut running = running();
        let running = running.as_mut().context("interrupted")?;
        let child = command.process_group(0).spawn();
        let program = command.get_program().display();
        let child = child.with_context(|| format!("{program} could not be started"))?;
        running.insert(child.id());
        child
    };
    let end = child.wait_timeout(limit).and_then(|end| {
        if end.is_none() {
            stop_group(child.id());
            child.wait()?;
        }
        Ok(end)
    });
    running().as_mut().map(|it| it.remove(&child.id()));
    Ok(end?)
}

/// Kills the process group that this process leads. One that has ended is none of our concern.
fn stop_group(process: u32) {
    let _ = killpg(Pid::from_raw(process as i32), Signal::SIGKILL);
}
