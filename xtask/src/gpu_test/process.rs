//! Runs processes for a limited time, and stops them with all that they have started.

use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::process::{Child, Command, ExitStatus};
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

/// Does what an interrupt does.
pub fn interrupt() {
    let mut interrupts = interrupts();
    interrupts.came = true;
    interrupts.running.iter().copied().for_each(stop_group);
}

pub fn is_interrupted() -> bool {
    interrupts().came
}

/// Runs `command` in a process group of its own, for no longer than `limit`; returns no status if it was stopped.
///
/// It must write to files only: a pipe would stay open while a process that it left behind lives.
pub fn run(command: &mut Command, limit: Duration) -> Result<Option<ExitStatus>> {
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(command, 0);
    let mut child = {
        // An interrupt in between would miss the new process.
        let mut interrupts = interrupts();
        ensure!(!interrupts.came, "interrupted");
        let program = command.get_program().display().to_string();
        let child = command.spawn();
        let child = child.with_context(|| format!("{program} could not be started"))?;
        interrupts.running.insert(child.id());
        child
    };
    let end = wait(&mut child, limit);
    interrupts().running.remove(&child.id());
    end
}

fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    if let Some(status) = child.wait_timeout(limit)? {
        return Ok(Some(status));
    }
    stop_group(child.id());
    // Where there are no groups, at least this one is stopped; where it is stopped, it cannot be again.
    let _ = child.kill();
    child.wait()?;
    Ok(None)
}

fn interrupts() -> MutexGuard<'static, Interrupts> {
    INTERRUPTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Kills the process group that this process leads. One that has ended is none of our concern.
fn stop_group(process: u32) {
    #[cfg(unix)]
    if let Ok(process) = i32::try_from(process) {
        use nix::sys::signal::{Signal, killpg};
        let _ = killpg(nix::unistd::Pid::from_raw(process), Signal::SIGKILL);
    }
    #[cfg(not(unix))]
    let _ = process;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn a_process_that_takes_too_long_is_stopped_with_its_children() {
        let folder = tempfile::tempdir().unwrap();
        let mark = folder.path().join("mark");
        let started = Instant::now();
        let script = format!("(sleep 1; echo late >{}) & sleep 60", mark.display());
        let mut shell = Command::new("sh");
        let end = run(shell.arg("-c").arg(script), Duration::from_millis(200));
        assert!(matches!(end, Ok(None)), "{end:?}");
        assert!(started.elapsed() < Duration::from_secs(30));
        std::thread::sleep(Duration::from_millis(1200));
        assert!(!mark.exists());
    }
}
