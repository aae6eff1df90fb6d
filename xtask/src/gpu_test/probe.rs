//! Whether a GPU answers on this machine: a small C program asks, as it does in the bundle.

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;
use xshell::{Shell, cmd};

/// How the names of simulated devices begin.
const SIMULATED: &str = "Simulated device ";

/// What the probe found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A GPU answers: the first one's name, how many there are, and the CUDA version of the driver.
    Gpu {
        name: String,
        count: u32,
        cuda: String,
    },
    /// There is no driver, or no device; why.
    NoGpu(String),
    /// There is a driver, and it fails; how.
    Broken(String),
}

impl Answer {
    /// How many GPUs answer, if any does.
    pub fn count(&self) -> Option<u32> {
        match self {
            Self::Gpu { count, .. } => Some(*count),
            _ => None,
        }
    }
}

/// Compiles the probe into `folder`.
pub fn compile(shell: &Shell, folder: &Path) -> Result<PathBuf> {
    let (source, program) = (folder.join("probe.c"), folder.join("probe"));
    shell.write_file(&source, include_str!("probe.c"))?;
    let cc = cmd!(shell, "cc -O1 -s -Wall -Wextra -o {program} {source} -ldl");
    cc.quiet().run()?;
    Ok(program)
}

/// Runs the probe.
pub fn ask(program: &Path) -> Result<Answer> {
    let output = Command::new(program).output();
    let output = output.with_context(|| format!("{} does not start", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let value = |key: &str| {
        let pairs = text.lines().filter_map(|line| line.split_once('='));
        let mut values = pairs.filter(|(name, _)| *name == key);
        values.next().map(|(_, value)| value.trim().to_owned())
    };
    let reason = || value("reason").unwrap_or_else(|| format!("the probe: {}", output.status));
    let [name, count] = ["name", "devices"].map(|key| value(key).unwrap_or_default());
    Ok(match output.status.code() {
        // Rows of the real driver are not for the simulator, by whatever name it was opened.
        Some(0) if name.starts_with(SIMULATED) => {
            Answer::NoGpu("the libcuda.so.1 that is found here is the simulated one".to_owned())
        }
        Some(0) => Answer::Gpu {
            name,
            count: count.parse().context("the number of GPUs")?,
            cuda: value("cuda").unwrap_or_default(),
        },
        Some(2) => Answer::NoGpu(reason()),
        _ => Answer::Broken(reason()),
    })
}
