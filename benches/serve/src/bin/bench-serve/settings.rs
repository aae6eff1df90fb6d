//! The workloads' file: which models, how much memory, which requests.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// The content of a workloads' file. Keys that it does not know are errors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    pub server: Server,
    pub ramps: Ramps,
    pub traces: Traces,
    pub idle: Idle,
    pub hand_over: HandOver,
    pub closed: Closed,
}

/// How each server is started, for all workloads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Server {
    /// What each model is: a shape that the server knows, or a folder.
    pub model: String,
    /// Type of weights, K and V.
    pub dtype: String,
    /// Memory for K and V of all models, in MiB.
    pub memory_mib: usize,
    /// K and V of a token of the model, in bytes, for the simulation beside what is measured.
    pub token_bytes: usize,
    /// Sequences of a model that run at once.
    pub sequences: u16,
    /// Requests of a model that wait; more are refused.
    pub waiting: u16,
    /// Tokens of prompts in a step.
    pub step_tokens: u16,
}

/// Tokens of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tokens {
    pub prompt: u32,
    pub generated: u32,
}

/// (a) models whose ramps hardly overlap.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ramps {
    pub models: u32,
    pub tokens: Tokens,
    /// Requests a second at the top of each ramp, rising.
    pub peaks: Vec<u32>,
    /// By how much each second of the published ramps is shorter. The rates are as published, so a
    /// ramp has fewer steps by this factor too. Each peak is a multiple of it.
    pub speed: u32,
    pub seeds: u64,
    /// Requests that are sent one after the other for the time of an unloaded server.
    pub unloaded: u32,
}

/// (b) excerpts of traces, a model each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Traces {
    /// Where the excerpt begins, in seconds of the trace.
    pub start_seconds: f64,
    /// How long it is, in seconds of the trace.
    pub seconds: f64,
    /// How many times later each request arrives than in the trace.
    pub stretch: f64,
    /// Longer prompts and texts are cut to these.
    pub tokens_max: Tokens,
    pub seeds: u64,
}

/// (c) idle models beside a busy one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Idle {
    pub idle_models: u32,
    /// Requests a second of each idle model, before it is idle.
    pub idle_rate: u32,
    pub idle_seconds: u32,
    /// How long after one idle model the next has its requests, and the busy one after the last.
    pub apart_seconds: u32,
    pub busy_rate: u32,
    pub busy_seconds: u32,
    pub tokens: Tokens,
    pub seeds: u64,
}

/// (d) a model whose requests fill the memory and end, and another that wants all of it then.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandOver {
    /// Requests of the first model, all at once.
    pub fill: u32,
    pub fill_tokens: Tokens,
    /// Requests of the other, all at once.
    pub then: u32,
    pub then_tokens: Tokens,
    pub seeds: u64,
}

/// (e) clients of one model, each of which sends its next request when the last has ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Closed {
    pub clients: Vec<u32>,
    pub requests_per_client: u32,
    pub tokens: Tokens,
    pub seeds: u64,
    /// Sequences of a model that run at once: as many as there are clients, for all to run.
    pub sequences: u16,
    /// Memory for K and V, in MiB, which all clients' requests fit into.
    pub memory_mib: usize,
}

impl Settings {
    /// Reads the text of a file.
    ///
    /// # Errors
    ///
    /// If it has a key that is not known or lacks one, or has a value that makes no sense.
    pub fn parse(text: &str) -> Result<Self> {
        let settings: Self = toml::from_str(text)?;
        settings.check()?;
        Ok(settings)
    }

    fn check(&self) -> Result<()> {
        let Ramps {
            models,
            peaks,
            speed,
            ..
        } = &self.ramps;
        ensure!(*speed > 0, "ramps.speed must be at least 1");
        ensure!(!peaks.is_empty(), "ramps.peaks must have a peak");
        ensure!(*models > 0, "ramps.models must be at least 1");
        for peak in peaks {
            let is_right = *peak > 0 && peak.is_multiple_of(*speed);
            ensure!(
                is_right,
                "ramps.peaks: {peak} is no multiple of ramps.speed, {speed}"
            );
        }
        ensure!(peaks.is_sorted(), "ramps.peaks must rise");
        ensure!(self.traces.stretch > 0.0, "traces.stretch must be above 0");
        ensure!(
            self.closed.clients.iter().all(|clients| *clients > 0),
            "closed.clients must be at least 1"
        );
        let tokens = [
            ("ramps.tokens", self.ramps.tokens),
            ("traces.tokens_max", self.traces.tokens_max),
            ("idle.tokens", self.idle.tokens),
            ("hand_over.fill_tokens", self.hand_over.fill_tokens),
            ("hand_over.then_tokens", self.hand_over.then_tokens),
            ("closed.tokens", self.closed.tokens),
        ];
        for (name, tokens) in tokens {
            ensure!(
                tokens.prompt > 0 && tokens.generated > 0,
                "{name} must be at least 1"
            );
        }
        Ok(())
    }

    /// Has each workload run with this many seeds.
    pub fn with_seeds(mut self, seeds: u64) -> Self {
        self.ramps.seeds = seeds;
        self.traces.seeds = seeds;
        self.idle.seeds = seeds;
        self.hand_over.seeds = seeds;
        self.closed.seeds = seeds;
        self
    }

    /// Shorter workloads, which show that everything runs.
    pub fn quick(mut self) -> Self {
        let shorter = |amount: &mut u32| *amount = amount.div_ceil(4);
        self.ramps.peaks.truncate(1);
        shorter(&mut self.ramps.unloaded);
        self.traces.seconds /= 4.0;
        shorter(&mut self.idle.idle_models);
        shorter(&mut self.idle.busy_seconds);
        self.closed.clients.truncate(1);
        shorter(&mut self.closed.requests_per_client);
        self.with_seeds(1)
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub const CPU: &str = include_str!("../../../workloads/cpu.toml");
    const H200: &str = include_str!("../../../workloads/h200.toml");

    #[test]
    fn the_committed_files_are_right() {
        for text in [CPU, H200] {
            let settings = Settings::parse(text).unwrap();
            assert!(settings.ramps.seeds > 0);
            // They come back from the JSON in which they are kept.
            let json = serde_json::to_string(&settings).unwrap();
            assert_eq!(serde_json::from_str::<Settings>(&json).unwrap(), settings);
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |from: &str, to: &str| {
            assert!(CPU.contains(from), "{from}");
            let text = CPU.replacen(from, to, 1);
            format!("{:#}", Settings::parse(&text).unwrap_err())
        };
        let cases = [
            ("memory_mib =", "memory_gib ="),
            ("[hand_over]", "[hand_back]"),
            ("speed = 2", "speed = 0"),
        ];
        let found = cases.map(|(from, to)| error(from, to));
        for (found, name) in found.iter().zip(["memory_gib", "hand_back", "ramps.speed"]) {
            assert!(found.contains(name), "{found}");
        }
        let missing = error("idle_rate", "#");
        assert!(missing.contains("idle_rate"), "{missing}");
        let none = error("tokens = { prompt = 64", "tokens = { prompt = 0");
        assert!(none.contains("ramps.tokens"), "{none}");
    }

    #[test]
    fn a_quick_run_has_one_seed_and_a_peak() {
        let quick = Settings::parse(CPU).unwrap().quick();
        assert_eq!((quick.ramps.seeds, quick.ramps.peaks.len()), (1, 1));
        let settings = Settings::parse(CPU).unwrap().with_seeds(7);
        assert_eq!((settings.ramps.seeds, settings.closed.seeds), (7, 7));
    }
}
