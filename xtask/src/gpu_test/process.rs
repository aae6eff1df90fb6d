//! Runs processes for a limited time, and stops them with all that they have started.

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use wait_timeout::ChildExt;

/// The processes that run now; nothing once an interrupt came.
static RUNNING: Mutex<Option<BTreeSet<u32>>> = Mutex::new(Some(BTreeSet::new()));

fn running() -> MutexGuard<'static, Option<BTreeSet<u32>>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From now on an interrupt stops the processes that run, and lets no other start; this one goes on.
pub fn heed_interrupts() -> Result<()> {
    ctrlc::set_handler(interrupt).context("no handler for interrupts could be set")
}

pub fn interrupt() {
    running().take().into_iter().flatten().for_each(stop_group);
}

pub fn is_interrupted() -> bool {
    running().is_none()
}

/// Runs `command` in a process group of its own, for no longer than `limit`; returns no status if it
/// was stopped.
///
/// It must write to files only: a pipe would stay open while a process that it left behind lives.
pub fn run(command: &mut Command, limit: Duration) -> Result<Option<ExitStatus>> {
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
