//! What is recorded of requests, and of memory.

use crate::arrivals::PhaseName;
use crate::metrics::Metrics;
use crate::policy::Policy;
use crate::workload::Workload;
use serde::Serialize;

/// A request, and what came of it. Times are microseconds from the run's beginning.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Recorded {
    pub model: usize,
    pub phase: PhaseName,
    pub prompt_tokens: usize,
    pub generated_tokens_asked: u32,
    /// When it was to be sent.
    pub planned_us: u64,
    pub sent_us: u64,
    pub first_token_us: Option<u64>,
    /// From each token to the next, the first token's time being `first_token_us`. Tokens that came
    /// together are 0 apart.
    pub token_gaps_us: Vec<u64>,
    pub end_us: u64,
    /// The status of HTTP, if there was a response.
    pub status: Option<u16>,
    /// In seconds, as the server said it.
    pub retry_after: Option<u64>,
    /// Why it has not all its tokens, unless it was refused.
    pub failure: Option<String>,
    pub tokens: usize,
}

impl Recorded {
    /// Whether it has all its tokens.
    pub fn is_served(&self) -> bool {
        self.status == Some(200) && self.failure.is_none()
    }

    /// Whether the server refused it, as too many wait.
    pub fn is_refused(&self) -> bool {
        self.status == Some(503) && self.retry_after.is_some()
    }

    /// From its planned arrival to its first token.
    pub fn first_token_wait_us(&self) -> Option<u64> {
        let first = self.first_token_us.filter(|_| self.is_served());
        first.map(|first| first.saturating_sub(self.planned_us))
    }

    /// When its last token came.
    pub fn last_token_us(&self) -> Option<u64> {
        let first = self.first_token_us;
        first.map(|first| first + self.token_gaps_us.iter().sum::<u64>())
    }

    /// From its first token to its last, for each token after the first.
    pub fn per_token_us(&self) -> Option<f64> {
        let all = self.token_gaps_us.iter().sum::<u64>() as f64;
        let later = self.token_gaps_us.len();
        (self.is_served() && later > 0).then(|| all / later as f64)
    }

    /// How much later it was sent than planned.
    pub fn late_us(&self) -> u64 {
        self.sent_us.saturating_sub(self.planned_us)
    }
}

/// What `/metrics` said at a moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Looked {
    /// From the run's beginning.
    pub at_us: u64,
    /// What the device holds for each model.
    pub committed_bytes: Vec<u64>,
    /// What of that sequences use.
    pub live_bytes: Vec<u64>,
    /// What of that only the prefix cache holds.
    pub prefix_bytes: Vec<u64>,
}

impl Looked {
    /// At a time, what the server says of its memory.
    pub fn new(at_us: u64, metrics: Metrics) -> Self {
        Self {
            at_us,
            committed_bytes: metrics.committed_bytes,
            live_bytes: metrics.live_bytes,
            prefix_bytes: metrics.prefix_bytes,
        }
    }
}

/// A run of a workload on one server.
#[derive(Clone, Debug, Serialize)]
pub struct Ran {
    pub workload: Workload,
    pub policy: Policy,
    pub peak: Option<u32>,
    pub seed: u64,
    pub requests: Vec<Recorded>,
    pub memory: Vec<Looked>,
    /// Sequences that lost their memory and were computed again.
    pub preemptions: u64,
}
