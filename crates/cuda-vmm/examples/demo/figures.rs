//! What the replays showed, as data.

use serde::Serialize;

use crate::memory::GpuFigures;
use crate::tally::Tally;
use crate::workload::Workload;

/// Everything that is printed, drawn and written to `--json`.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// Requests that found no memory in the elastic pool.
    pub elastic_refused: u64,
    /// Requests that found no memory in their model's share of the static split.
    pub static_refused: u64,
    /// What the elastic pool ran on.
    pub gpu: GpuFigures,
    /// Where the requests came from.
    pub input: Input,
    /// Physical memory for all models.
    pub limit_bytes: u64,
    /// Requests of all models.
    pub requests: u64,
    /// Simulated time until the last request ended, in the elastic pool.
    pub simulated_seconds: f64,
    /// Real time that the replay against the elastic pool took.
    pub elapsed_seconds: f64,
    /// One for each model.
    pub models: Vec<ModelFigures>,
    /// Memory and refusals over simulated time.
    pub over_time: Vec<Moment>,
}

/// Where the requests came from.
#[derive(Clone, Debug, Serialize)]
pub struct Input {
    /// Trace files; none if the services were generated.
    pub traces: Vec<String>,
    /// Seed of what was generated.
    pub seed: u64,
}

/// One model's row.
#[derive(Clone, Debug, Serialize)]
pub struct ModelFigures {
    /// Name in the pool.
    pub model: &'static str,
    /// The network whose dimensions are used.
    pub network: &'static str,
    /// KV cache of one token.
    pub bytes_per_token: u64,
    /// Requests that arrived.
    pub requests: u64,
    /// Their prompt tokens.
    pub prompt_tokens: u64,
    /// Their tokens to generate.
    pub generated_tokens: u64,
    /// What became of them in the elastic pool.
    pub elastic: Outcome,
    /// The most physical memory that the pool held for the model at once.
    pub elastic_peak_committed_bytes: u64,
    /// What would have become of them in the static split.
    pub r#static: Outcome,
    /// The model's share of the static split.
    pub static_share_bytes: u64,
}

/// What became of a model's requests.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Requests that ran to their end.
    pub completed: u64,
    /// Requests refused, at arrival or midway.
    pub refused: u64,
    /// Requests whose prompt found no memory.
    pub refused_at_arrival: u64,
    /// Requests that found no memory for a generated token.
    pub refused_midway: u64,
    /// Tokens that were given memory, those of requests refused midway included.
    pub tokens: u64,
    /// The most KV cache that running requests held at once.
    pub peak_live_bytes: u64,
}

/// One moment of simulated time.
#[derive(Clone, Debug, Serialize)]
pub struct Moment {
    /// Simulated time since the first arrival.
    pub seconds: f64,
    /// Physical memory that the elastic pool holds.
    pub committed_bytes: u64,
    /// KV cache of each model in the elastic pool.
    pub live_bytes: Vec<u64>,
    /// Requests refused so far.
    pub elastic_refused: u64,
    /// Requests that the static split would have refused so far.
    pub static_refused: u64,
}

impl From<&Tally> for Outcome {
    fn from(tally: &Tally) -> Self {
        Self {
            completed: tally.completed,
            refused: tally.refused(),
            refused_at_arrival: tally.refused_at_arrival,
            refused_midway: tally.refused_midway,
            tokens: tally.tokens,
            peak_live_bytes: tally.peak_live_bytes,
        }
    }
}

/// Requests refused of all models.
pub fn refused(tallies: &[Tally]) -> u64 {
    tallies.iter().map(Tally::refused).sum()
}

/// A row for each model.
pub fn models(
    workload: &Workload,
    elastic: &[Tally],
    peaks_committed_bytes: &[u64],
    split: &[Tally],
    shares_bytes: &[u64],
) -> Vec<ModelFigures> {
    let row = |index: usize| {
        let service = &workload.services[index];
        ModelFigures {
            model: service.model.name,
            network: service.model.network,
            bytes_per_token: service.model.bytes_per_token,
            requests: service.requests.len() as u64,
            prompt_tokens: service.prompt_tokens(),
            generated_tokens: service.generated_tokens(),
            elastic: Outcome::from(&elastic[index]),
            elastic_peak_committed_bytes: peaks_committed_bytes[index],
            r#static: Outcome::from(&split[index]),
            static_share_bytes: shares_bytes[index],
        }
    };
    (0..workload.services.len()).map(row).collect()
}
