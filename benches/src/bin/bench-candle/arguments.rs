//! What the program is asked to do.

use clap::{Parser, ValueEnum};
use std::path::PathBuf;

/// Where it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Place {
    /// GPU 0; without it nothing is measured.
    Cuda,
    /// Host memory: every measurement runs, small, but times mean nothing and are not judged.
    Cpu,
}

/// Measures tensors and caches that grow on a GPU, beside Candle's own.
///
/// Exit code: 0, everything that is demanded is reached; 1, something is not; 2, no GPU answers; 64, wrong usage.
#[derive(Debug, Parser)]
#[command(name = "bench-candle")]
pub struct Arguments {
    /// Where to run
    #[arg(long, value_enum, default_value_t = Place::Cuda)]
    pub device: Place,
    /// Small sizes, as on a CPU; times are not judged
    #[arg(long)]
    pub quick: bool,
    /// Write a list of `name`, `ours`, `peer`, `ratio`, `reach`, `pass`, `unit`, `note` to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Measure only work whose name, or a figure of it, contains this
    #[arg(long, value_name = "WORD")]
    pub only: Option<String>,
}
