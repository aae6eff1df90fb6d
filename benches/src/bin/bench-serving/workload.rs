//! What is asked of the models that share a GPU.

/// One request: when it arrives and how long it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Arrival in nanoseconds of simulated time.
    pub arrival_ns: u64,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens that are generated, the first of them by the prompt's step.
    pub generated_tokens: u32,
}

impl Request {
    /// Tokens that the request holds when its last token is made, which is written no more.
    pub fn tokens_max(&self) -> u32 {
        (self.prompt_tokens + self.generated_tokens).saturating_sub(1)
    }
}

/// All that is asked: for each model its requests in the order of arrival.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// The requests of each model.
    pub models: Vec<Vec<Request>>,
}
