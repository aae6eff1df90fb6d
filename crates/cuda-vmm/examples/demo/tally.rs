//! What became of requests.

/// What became of one model's requests so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Requests that ran to their end.
    pub completed: u64,
    /// Requests whose prompt found no memory.
    pub refused_at_arrival: u64,
    /// Requests that found no memory for a generated token.
    pub refused_midway: u64,
    /// Tokens that were given memory.
    pub tokens: u64,
    /// KV cache that running requests hold, in bytes.
    pub live_bytes: u64,
    /// The most that they held at once, in bytes.
    pub peak_live_bytes: u64,
}

impl Tally {
    /// Requests refused, at arrival or later.
    pub fn refused(&self) -> u64 {
        self.refused_at_arrival + self.refused_midway
    }
}
