//! The machine on which the matrix ran, and what was run there.

use super::conditions::Conditions;
use super::libraries::first_line;
use super::manifest::Manifest;
use serde::Serialize;
use std::process::Command;

/// The facts of a report.
#[derive(Clone, Debug, Serialize)]
pub struct Facts {
    /// The first GPU's name, if one answers.
    gpu: Option<String>,
    /// How many GPUs there are, if they were looked for.
    gpus: Option<u32>,
    /// The driver's version.
    driver: Option<String>,
    /// The newest CUDA version that the driver knows.
    cuda: Option<String>,
    /// The operating system's kernel.
    kernel: Option<String>,
    /// When the matrix was started.
    date: Option<String>,
    /// The command line.
    command: String,
    /// The commit that was built.
    commit: String,
    /// The Rust compiler.
    compiler: String,
    /// The oldest GPUs for which Candle's kernels were built.
    candle_kernels: Option<String>,
    /// Where the CUDA libraries are that Candle links, if it was linked to them.
    cuda_libraries: Option<String>,
}

impl Facts {
    /// Asks the machine.
    pub fn gather(command: String, conditions: &Conditions, manifest: &Manifest) -> Self {
        let answer = conditions.gpu.as_ref();
        let gpu = answer.and_then(|answer| answer.gpu());
        let driver = || {
            first_line(
                Command::new("nvidia-smi")
                    .args(["--query-gpu=driver_version", "--format=csv,noheader"]),
            )
        };
        Self {
            gpu: gpu.map(|gpu| gpu.name.clone()),
            gpus: answer.map(|_| gpu.map_or(0, |gpu| gpu.count)),
            driver: gpu.and_then(|_| driver()),
            cuda: gpu.map(|gpu| gpu.cuda.clone()),
            kernel: first_line(Command::new("uname").arg("-sr")),
            date: first_line(Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"])),
            command,
            commit: manifest.commit.clone(),
            compiler: manifest.compiler.clone(),
            candle_kernels: manifest.candle_kernels.clone(),
            cuda_libraries: (!manifest.libraries.is_empty())
                .then(|| conditions.libraries.describe()),
        }
    }

    /// Names and values, as a person reads them.
    pub fn lines(&self) -> Vec<(&'static str, String)> {
        let known = |value: &Option<String>| value.clone().unwrap_or_else(|| "not known".into());
        let unless_none = |value: &Option<String>| value.clone().unwrap_or_else(|| "none".into());
        let not_asked = || "not asked".to_owned();
        vec![
            ("GPU", self.first_gpu()),
            (
                "GPUs",
                self.gpus.map_or_else(not_asked, |count| count.to_string()),
            ),
            ("Driver", known(&self.driver)),
            ("CUDA version of the driver", unless_none(&self.cuda)),
            ("Kernel", known(&self.kernel)),
            ("Date", known(&self.date)),
            ("Command", format!("`{}`", self.command)),
            ("Built from", format!("commit {}", self.commit)),
            ("Built with", self.compiler.clone()),
            ("Candle's kernels for", unless_none(&self.candle_kernels)),
            ("CUDA libraries", unless_none(&self.cuda_libraries)),
        ]
    }

    /// The first GPU's name, or why there is none.
    pub fn first_gpu(&self) -> String {
        let otherwise = match self.gpus {
            Some(_) => "none",
            None => "not asked",
        };
        self.gpu.clone().unwrap_or_else(|| otherwise.to_owned())
    }
}
