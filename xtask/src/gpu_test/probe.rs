//! Whether a GPU answers on this machine: a small C program asks, as it does in the bundle.

use crate::files;
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

const SOURCE: &str = include_str!("probe.c");
/// How the names of simulated devices begin.
const SIMULATED: &str = "Simulated device ";

/// What the probe found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A GPU answers.
    Gpu(Gpu),
    /// There is no driver, or no device; why.
    NoGpu(String),
    /// There is a driver, and it fails; how.
    Broken(String),
}

/// The first GPU, and how many there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// The first one's name.
    pub name: String,
    /// How many there are.
    pub count: u32,
    /// The CUDA version of the driver.
    pub cuda: String,
}

impl Answer {
    /// The first GPU, if one answers.
    pub fn gpu(&self) -> Option<&Gpu> {
        match self {
            Self::Gpu(gpu) => Some(gpu),
            _ => None,
        }
    }
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
    let text = String::from_utf8_lossy(&output.stdout);
    let value = |key: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
            .map(|value| value.trim().to_owned())
    };
    let reason = || value("reason").unwrap_or_else(|| format!("the probe: {}", output.status));
    let name = value("name").unwrap_or_default();
    Ok(match output.status.code() {
        // Rows of the real driver are not for the simulator, by whatever name it was opened.
        Some(0) if name.starts_with(SIMULATED) => {
            Answer::NoGpu("the libcuda.so.1 that is found here is the simulated one".to_owned())
        }
        Some(0) => Answer::Gpu(Gpu {
            name,
            count: value("devices")
                .and_then(|count| count.parse().ok())
                .context("the probe does not tell the number of GPUs")?,
            cuda: value("cuda").unwrap_or_default(),
        }),
        Some(2) => Answer::NoGpu(reason()),
        _ => Answer::Broken(reason()),
    })
}
