//! What one step computes.

use super::ask::Id;

/// Tokens of one sequence that a step computes at once: of its prompt, and, if it was preempted, of
/// what it had generated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// The sequence.
    pub id: Id,
    /// The first of the tokens; those before it are computed or in the prefix cache.
    pub first: usize,
    /// How many tokens.
    pub count: usize,
    /// Whether the sequence has a new token after it.
    pub is_last: bool,
}

/// What one step computes, and who lost its memory for it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Step {
    /// Sequences of which the last token is computed and the next generated, in the order of
    /// arrival.
    pub decodes: Vec<Id>,
    /// Chunks, in the order of arrival.
    pub chunks: Vec<Chunk>,
    /// Sequences that lost their memory, the youngest first. They have no part in the step.
    pub preempted: Vec<Id>,
    pub(super) number: u64,
}

impl Step {
    /// Whether there is nothing to compute. If sequences run or wait all the same, other models
    /// have the memory that they need.
    pub fn is_empty(&self) -> bool {
        self.decodes.is_empty() && self.chunks.is_empty()
    }

    /// How many tokens it computes.
    pub fn tokens(&self) -> usize {
        let chunks = self.chunks.iter().map(|chunk| chunk.count);
        self.decodes.len() + chunks.sum::<usize>()
    }
}
