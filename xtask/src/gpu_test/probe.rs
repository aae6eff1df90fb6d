//! Whether a GPU answers on this machine: a small C program asks, as it does in the bundle.

use super::cell::State;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;
use xshell::{Shell, cmd};

/// How the names of simulated devices begin.
const SIMULATED: &str = "Simulated device ";

/// The GPUs that answer.
#[derive(Clone, Debug)]
pub struct Gpus {
    /// The first one's name.
    pub name: String,
    pub count: u32,
    /// The CUDA version of the driver.
    pub cuda: String,
}

/// What becomes of a row that cannot be run, and why.
pub type Obstacle = (State, String);
pub type Answer = Result<Gpus, Obstacle>;

pub fn compile(shell: &Shell, folder: &Path) -> Result<PathBuf> {
    let (source, program) = (folder.join("probe.c"), folder.join("probe"));
    shell.write_file(&source, include_str!("probe.c"))?;
    let cc = cmd!(shell, "cc -O1 -s -Wall -Wextra -o {program} {source} -ldl");
    cc.quiet().run()?;
    Ok(program)
}

/// Runs the probe. Without a driver or a GPU, rows are skipped; a driver that fails is their failure.
pub fn ask(program: &Path) -> Result<Answer> {
    let output = Command::new(program).output();
    let output = output.with_context(|| format!("{} does not start", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let value = |key: &str| {
        let mut pairs = text.lines().filter_map(|line| line.split_once('='));
        let (_, value) = pairs.find(|(name, _)| *name == key)?;
        Some(value.trim().to_owned())
    };
    let reason = || value("reason").unwrap_or_else(|| format!("the probe: {}", output.status));
    let [name, count, cuda] = ["name", "devices", "cuda"].map(|key| value(key).unwrap_or_default());
    let (state, reason) = match output.status.code() {
        // Rows of the real driver are not for the simulator, by whatever name it was opened.
        Some(0) if name.starts_with(SIMULATED) => {
            let reason = "the libcuda.so.1 that is found here is the simulated one";
            (State::Skipped, reason.to_owned())
        }
        Some(0) => {
            let count = count.parse().context("the number of GPUs")?;
            return Ok(Ok(Gpus { name, count, cuda }));
        }
        Some(2) => (State::Skipped, reason()),
        _ => (
            State::Fail,
            "the CUDA driver is here, but fails: ".to_owned() + &reason(),
        ),
    };
    Ok(Err((state, reason)))
}
