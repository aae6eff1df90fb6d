//! What came of serving.

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moment {
    pub at_ns: u64,
    /// What each model held, in bytes.
    pub held_bytes: Vec<u64>,
}

/// What came of serving, in one run or in several of the same.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Served {
    /// From a request's arrival to the end of the step that made its first token.
    pub first_token: Vec<f64>,
    /// From a request's first token to its last, for each token after the first.
    pub per_token: Vec<f64>,
    pub served: usize,
    /// Requests that could never have had their memory.
    pub refused: usize,
    /// Prompts that had to wait because memory was short.
    pub refused_prompts: usize,
    /// Sequences that lost their memory and were computed again.
    pub preemptions: u64,
    pub tokens: u64,
    pub sequences_max: usize,
    /// What the pool's calls cost the thread that takes the steps, for each step.
    pub calls: Vec<f64>,
    /// What each step took in all.
    pub steps: Vec<f64>,
    /// When the last request ended; of several runs the sum.
    pub end_ns: u64,
    /// What the pool's calls cost in all, those without a step among them.
    pub calls_ns: u64,
    pub held_bytes_max: u64,
    /// Memory over time, in the first run.
    pub over_time: Vec<Moment>,
}

impl Served {
    /// Tokens that were generated in a second, over all the time.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / (self.end_ns as f64 / 1e9)
    }
}
