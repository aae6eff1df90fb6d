//! The file with all that was recorded.

use crate::metrics::{PromptSteps, Steps};
use crate::policy::Policy;
use crate::record::Ran;
use crate::settings::Settings;
use crate::workload::Workload;
use anyhow::{Context, Result};
use serde::Serialize;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// How a server was started.
#[derive(Clone, Debug, Serialize)]
pub struct Started {
    pub workload: Workload,
    pub policy: Policy,
    pub flags: Vec<String>,
    /// Its steps without prompts, until it ended.
    pub steps: Vec<Steps>,
    pub prompt_steps: Vec<PromptSteps>,
}

/// What the file holds.
#[derive(Serialize)]
pub struct Report<'a> {
    pub command: Vec<String>,
    /// The workloads' file, as it is.
    pub file: &'a str,
    /// What of it was run: the same, unless arguments said otherwise.
    pub settings: &'a Settings,
    pub traces: Vec<String>,
    pub servers: &'a [Started],
    pub runs: &'a [Ran],
}

impl Report<'_> {
    /// Writes it as JSON.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let name = || format!("writing {}", path.display());
        let mut file = BufWriter::new(File::create(path).with_context(name)?);
        serde_json::to_writer(&mut file, self).with_context(name)?;
        file.write_all(b"\n")
            .and_then(|()| file.flush())
            .with_context(name)
    }
}
