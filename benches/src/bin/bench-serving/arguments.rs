//! What the program is asked to do.

use clap::{Parser, Subcommand};
use std::path::PathBuf;

/// Simulates serving several models on one GPU, in four pools, on the same arrivals. Needs no GPU.
///
/// Exit code: 0, everything that is demanded is reached; 1, something is not; 64, wrong usage.
#[derive(Debug, Parser)]
#[command(name = "bench-serving")]
pub struct Arguments {
    /// Write a list of `name`, `ours`, `peer`, `ratio`, `reach`, `pass`, `unit`, `note` to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the plots to this folder
    #[arg(long, value_name = "FOLDER")]
    pub plots: Option<PathBuf>,
    /// An Azure LLM inference trace for workload (b), one model each; can be given again
    #[arg(long, value_name = "FILE")]
    pub trace: Vec<PathBuf>,
    /// Shorter workloads, which show that everything runs and are not judged
    #[arg(long)]
    pub quick: bool,
    /// Something else than the benchmark
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What else there is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Find the constants of the time model again, by the published static curve as a whole
    Fit,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traces_can_be_given_again() {
        let arguments =
            Arguments::parse_from(["bench-serving", "--trace", "a", "--trace", "b", "--quick"]);
        assert_eq!(arguments.trace.len(), 2);
        assert!(arguments.quick && arguments.command.is_none());
        let arguments = Arguments::parse_from(["bench-serving", "fit"]);
        assert_eq!(arguments.command, Some(Command::Fit));
    }
}
