//! Whether a GPU answers on this machine: a small C program asks, as it does in the bundle.

use crate::files;
use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

const SOURCE: &str = include_str!("probe.c");

/// What the probe found.
#[derive(Debug)]
pub enum Answer {
    /// A GPU answers.
    Gpu,
    /// There is no driver, or no device; why.
    NoGpu(String),
}

/// Compiles the probe into `folder`.
pub fn compile(folder: &Path) -> Result<PathBuf> {
    files::make(folder)?;
    let source = folder.join("probe.c");
    std::fs::write(&source, SOURCE).with_context(|| format!("writing {}", source.display()))?;
    let program = folder.join("probe");
    let output = Command::new("cc")
        .args(["-O1", "-s", "-Wall", "-Wextra", "-o"])
        .arg(&program)
        .arg(&source)
        .arg("-ldl")
        .output()
        .context("the C compiler cc could not be started")?;
    ensure!(
        output.status.success(),
        "cc could not compile {}:\n{}",
        source.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(program)
}

/// Runs the probe.
pub fn ask(program: &Path) -> Result<Answer> {
    let output = Command::new(program)
        .output()
        .with_context(|| format!("{} could not be started", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let reason = text
        .lines()
        .find_map(|line| line.strip_prefix("reason="))
        .unwrap_or("no reason given");
    match output.status.code() {
        Some(0) => Ok(Answer::Gpu),
        Some(2) => Ok(Answer::NoGpu(reason.to_owned())),
        _ => bail!("the CUDA driver is here, but fails: {reason}"),
    }
}
