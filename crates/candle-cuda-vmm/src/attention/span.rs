//! The queries of a sequence in a ragged batch.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

/// A chunk of queries of one sequence, for [`prompt`](super::prompt).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptSpan {
    /// The sequence, counted from 0.
    pub sequence: usize,
    /// The number of queries; at least 1. They are those of the last of the keys.
    pub queries: usize,
    /// The number of tokens of the sequence, those of this chunk included.
    pub keys: usize,
}

impl PromptSpan {
    /// Makes the span of the last `queries` of `keys` tokens of a sequence.
    pub const fn new(sequence: usize, queries: usize, keys: usize) -> Self {
        Self {
            sequence,
            queries,
            keys,
        }
    }
}
