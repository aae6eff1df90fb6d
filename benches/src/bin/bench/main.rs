//! Measures the pools on a GPU, beside the driver's own calls and other allocators, in one run.

mod bare;
mod machine;
mod traffic;
mod work;

use anyhow::{Result, anyhow, ensure};
use clap::{Args, Parser, ValueEnum};
use cuda_vmm_benches::Settings;
use cuda_vmm_benches::program::{self, Wanted};
use machine::Machine;
use std::process::ExitCode;
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Choice {
    /// NVIDIA's; without it nothing is measured.
    Real,
    /// Host memory: every measurement runs, but times mean nothing and are not judged.
    Simulated,
}

/// Measures the pools on a GPU beside the driver's own calls and other allocators.
///
/// Exit code: 0, what is demanded is reached; 1, something is not; 2, no GPU; 64, wrong usage.
#[derive(Debug, Parser)]
#[command(name = "bench")]
struct Arguments {
    /// The driver
    #[arg(long, value_enum, default_value_t = Choice::Real)]
    driver: Choice,
    #[command(flatten)]
    wanted: Wanted,
    /// How many rounds work gets that takes some milliseconds; shorter work gets more, longer work fewer
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    #[command(flatten)]
    replay: Replay,
}

impl Arguments {
    /// How long each piece of work is measured. Of twenty-three pieces two take up to four times as
    /// long and one eight times; all but the replay shall end within six minutes.
    fn settings(&self) -> Settings {
        let seconds = if self.driver == Choice::Real { 9 } else { 1 };
        Settings::new(self.rounds as usize, seconds)
    }
}

/// What all models together may hold unless told, as published.
const TOKENS: usize = 213_000;

/// The trace, which part of it is replayed, and how long a step of a model takes.
#[derive(Clone, Copy, Debug, PartialEq, Args)]
struct Replay {
    /// Requests a second to which each model's rate climbs, by one each second
    #[arg(long = "replay-peak", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1000))]
    peak: u32,
    /// Where in the trace the replay begins, in seconds; half way up the first model's climb where it is not given
    #[arg(long = "replay-from", value_name = "SECONDS", value_parser = at_least_zero)]
    from_s: Option<f64>,
    /// How many seconds are replayed, in real time: once with the pool, and once with everything allocated before
    #[arg(long = "replay-seconds", value_name = "SECONDS", default_value_t = 60.0, value_parser = at_least_zero)]
    seconds: f64,
    /// A decode step without its sequences, in milliseconds
    #[arg(long = "replay-step-ms", value_name = "MS", default_value_t = 24.0, value_parser = at_least_zero)]
    step_ms: f64,
    /// What each sequence adds to it, in milliseconds
    #[arg(long = "replay-sequence-ms", value_name = "MS", default_value_t = 0.2, value_parser = at_least_zero)]
    sequence_ms: f64,
    /// What a prompt's token takes, in milliseconds
    #[arg(long = "replay-prompt-token-ms", value_name = "MS", default_value_t = 0.103, value_parser = at_least_zero)]
    prompt_token_ms: f64,
    /// Tokens whose keys and values all models together may hold, 131,072 bytes each
    #[arg(long = "replay-tokens", value_name = "TOKENS", default_value_t = TOKENS)]
    tokens: usize,
}

/// A number of at most a day's seconds that is not negative.
fn at_least_zero(text: &str) -> Result<f64> {
    let value: f64 = text.parse().map_err(|_| anyhow!("{text:?} is no number"))?;
    let is_in_a_day = (0.0..=86_400.0).contains(&value);
    ensure!(is_in_a_day, "{value} is not between 0 and 86400");
    Ok(value)
}

impl Replay {
    /// The part of the trace that is replayed, in seconds.
    fn window_s(&self) -> (f64, f64) {
        let from_s = self.from_s.unwrap_or(f64::from(self.peak) / 2.0);
        (from_s, from_s + self.seconds)
    }

    /// How long a step of these numbers of sequences and prompt tokens takes.
    fn step_time(&self, sequences: usize, prompt_tokens: usize) -> Duration {
        let base_ms = if sequences > 0 { self.step_ms } else { 0.0 };
        let decode_ms = base_ms + self.sequence_ms * sequences as f64;
        let prompt_ms = self.prompt_token_ms * prompt_tokens as f64;
        Duration::from_secs_f64((decode_ms + prompt_ms) / 1e3)
    }
}

fn main() -> ExitCode {
    program::start("bench", |arguments: &Arguments| {
        let may_be_absent = arguments.driver == Choice::Real;
        let open = || Machine::open(arguments);
        let work = (work::ALL, include_str!("../../../figures/bench.csv"));
        program::measure(work, &arguments.wanted, may_be_absent, open, |machine| {
            (&machine.device, machine.is_real())
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_real_driver_and_a_window_of_two_ramps_are_meant_unless_told() {
        let arguments = Arguments::parse_from(["bench"]);
        assert_eq!(arguments.driver, Choice::Real);
        assert_eq!(arguments.settings().rounds, 200);
        let arguments = Arguments::parse_from(["bench", "--driver", "simulated", "--rounds", "1"]);
        assert_eq!(arguments.driver, Choice::Simulated);
        assert_eq!(arguments.settings().rounds_min(), 1);
        assert!(Arguments::try_parse_from(["bench", "--rounds", "0"]).is_err());

        let replay = Arguments::parse_from(["bench"]).replay;
        assert_eq!(replay.window_s(), (8.0, 68.0));
        assert_eq!(replay.step_time(0, 0), Duration::ZERO);
        assert_eq!(replay.step_time(100, 0), Duration::from_millis(44));
        assert_eq!(replay.step_time(0, 1000), Duration::from_millis(103));
        let told = ["bench", "--replay-from", "3", "--replay-seconds", "0.5"];
        assert_eq!(Arguments::parse_from(told).replay.window_s(), (3.0, 3.5));
        for wrong in ["-1", "NaN", "inf", "86401", "x"] {
            let told = format!("--replay-seconds={wrong}");
            let parsed = Arguments::try_parse_from(["bench", &told]);
            assert!(parsed.is_err(), "{wrong}");
        }
    }
}
