//! What came of a workload in one pool.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

/// Times of many requests, in nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Times(Vec<u64>);

impl Times {
    /// In any order.
    pub fn new(mut times_ns: Vec<u64>) -> Self {
        times_ns.sort_unstable();
        Self(times_ns)
    }

    /// With those of another run.
    pub fn merged(self, other: Self) -> Self {
        Self::new([self.0, other.0].concat())
    }

    /// The smallest time that so many of a hundred do not exceed; no number where there are none.
    pub fn percentile_ms(&self, percent: usize) -> f64 {
        let rank = (percent * self.0.len()).div_ceil(100).max(1);
        self.0.get(rank - 1).map_or(f64::NAN, |ns| *ns as f64 / 1e6)
    }

    /// The mean; no number where there are none.
    pub fn mean_ms(&self) -> f64 {
        let sum: u128 = self.0.iter().map(|ns| u128::from(*ns)).sum();
        sum as f64 / self.0.len() as f64 / 1e6
    }
}

/// What was held at a moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moment {
    /// Simulated time.
    pub at_ns: u64,
    /// What each model held, in bytes.
    pub held_bytes: Vec<u64>,
}

/// What came of a workload in one pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// From a request's arrival to the end of the step that made its first token.
    pub first_token: Times,
    /// From a request's first token to its last, for each token after the first.
    pub per_token: Times,
    /// Requests that were served to their end.
    pub served: usize,
    /// Requests that could never have had their memory.
    pub refused: usize,
    /// Sequences that lost their memory and were computed again.
    pub preemptions: u64,
    /// Tokens that were generated.
    pub tokens: u64,
    /// Steps of all models.
    pub steps: u64,
    /// When the last request ended; of several runs the sum.
    pub end_ns: u64,
    /// What the pool's calls cost the thread that takes the steps, in all.
    pub calls_ns: u64,
    /// The most that they cost between two steps.
    pub calls_ns_max: u64,
    /// Calls on that thread that change memory or how it is mapped.
    pub memory_calls: u64,
    /// The most that was held at once, in bytes.
    pub held_bytes_max: u64,
    /// Memory over time.
    pub over_time: Vec<Moment>,
}

impl Outcome {
    /// With another run of the same: all requests of both, the worst of what is a maximum, and the first one's memory over
    /// time.
    pub fn merged(self, other: Self) -> Self {
        Self {
            first_token: self.first_token.merged(other.first_token),
            per_token: self.per_token.merged(other.per_token),
            served: self.served + other.served,
            refused: self.refused + other.refused,
            preemptions: self.preemptions + other.preemptions,
            tokens: self.tokens + other.tokens,
            steps: self.steps + other.steps,
            end_ns: self.end_ns + other.end_ns,
            calls_ns: self.calls_ns + other.calls_ns,
            calls_ns_max: self.calls_ns_max.max(other.calls_ns_max),
            memory_calls: self.memory_calls + other.memory_calls,
            held_bytes_max: self.held_bytes_max.max(other.held_bytes_max),
            over_time: self.over_time,
        }
    }

    /// Tokens that were generated in a second, over all the time.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / (self.end_ns as f64 / 1e9)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_times_that_were_seen() {
        let times = Times::new((1..=200).rev().map(|ms| ms * 1_000_000).collect());
        assert_eq!(
            [50, 99, 100].map(|percent| times.percentile_ms(percent)),
            [100.0, 198.0, 200.0]
        );
        assert_eq!(times.mean_ms(), 100.5);
        assert!(Times::default().percentile_ms(99).is_nan());
    }
}
