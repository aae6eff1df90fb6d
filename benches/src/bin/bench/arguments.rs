//! What the program is asked to do.

use crate::machine::Settings;
use crate::work::ReplaySettings;
use clap::{Parser, ValueEnum};
use std::path::PathBuf;
use std::time::Duration;

/// Which driver answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    /// NVIDIA's; without it nothing is measured.
    Real,
    /// Host memory: every measurement runs, but times mean nothing and are not judged.
    Simulated,
}

/// Measures the pools on a GPU beside the driver's own calls and other allocators.
///
/// Exit code: 0, everything that is demanded is reached; 1, something is not; 2, no GPU answers; 64, wrong usage.
#[derive(Debug, Parser)]
#[command(name = "bench")]
pub struct Arguments {
    /// The driver
    #[arg(long, value_enum, default_value_t = Choice::Real)]
    pub driver: Choice,
    /// Write a list of `name`, `ours`, `peer`, `ratio`, `reach`, `pass`, `unit`, `note` to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Measure only work whose name, or a figure of it, contains this
    #[arg(long, value_name = "WORD")]
    pub only: Option<String>,
    /// How many rounds work gets that takes some milliseconds; shorter work gets more, longer work fewer
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// How the replay of a server's work is made
    #[command(flatten)]
    pub replay: ReplaySettings,
}

impl Arguments {
    /// How long each piece of work is measured. There are seventeen pieces, of which two take up to four times as long and one
    /// eight times; all but the replay, which says itself how long it takes, shall end within five minutes.
    pub fn settings(&self) -> Settings {
        Settings {
            rounds: self.rounds as usize,
            rounds_min: 3.min(self.rounds as usize),
            patience: match self.driver {
                Choice::Real => Duration::from_secs(9),
                Choice::Simulated => Duration::from_secs(1),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_real_driver_is_meant_unless_told() {
        let arguments = Arguments::parse_from(["bench"]);
        assert_eq!(arguments.driver, Choice::Real);
        assert_eq!(arguments.settings().rounds, 200);
        let arguments = Arguments::parse_from(["bench", "--driver", "simulated", "--rounds", "1"]);
        assert_eq!(arguments.driver, Choice::Simulated);
        assert_eq!(arguments.settings().rounds_min, 1);
        assert!(Arguments::try_parse_from(["bench", "--rounds", "0"]).is_err());
    }
}
