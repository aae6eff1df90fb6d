//! Runs processes for a limited time, and stops them with all that they have started.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use wait_timeout::ChildExt;

/// The processes that run now, and whether an interrupt came.
struct Interrupts {
    running: BTreeSet<u32>,
    came: bool,
}

static INTERRUPTS: Mutex<Interrupts> = Mutex::new(Interrupts {
    running: BTreeSet::new(),
    came: false,
});

/// From now on an interrupt stops the processes that run, and lets no other start; this one goes on.
pub fn heed_interrupts() -> Result<()> {
    ctrlc::set_handler(interrupt).context("no handler for interrupts could be set")
}

pub fn interrupt() {
    let mut interrupts = interrupts();
    interrupts.came = true;
    interrupts.running.iter().copied().for_each(stop_group);
}

pub fn is_interrupted() -> bool {
    interrupts().came
}

/// Runs `command` in a process group of its own, for no longer than `limit`; returns no status if it
/// was stopped.
///
/// It must write to files only: a pipe would stay open while a process that it left behind lives.
pub fn run(command: &mut Command, limit: Duration) -> Result<Option<ExitStatus>> {
    let mut child = {
        // An interrupt in between would miss the new process.
        let mut interrupts = interrupts();
        ensure!(!interrupts.came, "interrupted");
        let child = command.process_group(0).spawn();
        let child = child
            .with_context(|| format!("{} could not be started", command.get_program().display()))?;
        interrupts.running.insert(child.id());
        child
    };
    let end = child.wait_timeout(limit).and_then(|end| {
        if end.is_none() {
            stop_group(child.id());
            child.wait()?;
        }
        Ok(end)
    });
    interrupts().running.remove(&child.id());
    Ok(end?)
}

fn interrupts() -> MutexGuard<'static, Interrupts> {
    INTERRUPTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Kills the process group that this process leads. One that has ended is none of our concern.
fn stop_group(process: u32) {
    let _ = killpg(Pid::from_raw(process as i32), Signal::SIGKILL);
}
