//! What a build says of itself, and a bundle carries along.

use super::libraries::first_line;
use crate::workspace::Workspace;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::Path;
use std::process::Command;

/// The manifest's file in a bundle.
const FILE: &str = "bundle.json";

/// Facts of a build.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The commit, with a mark if files differ from it.
    pub commit: String,
    /// The Rust compiler.
    pub compiler: String,
    /// The oldest GPUs for which Candle's kernels are built, if they are.
    pub candle_kernels: Option<String>,
    /// The CUDA libraries that the facade's tests need, the driver's left out.
    pub libraries: Vec<String>,
}

impl Manifest {
    /// Of what is built from the checkout now.
    pub fn of(workspace: &Workspace) -> Self {
        let mut git = Command::new("git");
        git.current_dir(&workspace.root)
            .args(["describe", "--always", "--dirty", "--abbrev=12"]);
        Self {
            commit: known(first_line(&mut git)),
            compiler: known(first_line(Command::new("rustc").arg("--version"))),
            candle_kernels: None,
            libraries: Vec::new(),
        }
    }

    /// Writes it into the folder of a bundle.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        fs::write(folder.join(FILE), text).with_context(|| format!("writing {FILE}"))
    }

    /// Reads it from an unpacked bundle.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        let text =
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display()))
    }
}

fn known(line: Option<String>) -> String {
    line.unwrap_or_else(|| "not known".to_owned())
}
