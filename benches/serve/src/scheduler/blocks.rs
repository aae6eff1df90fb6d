//! The memory of a model's sequences, as the scheduler sees it.

use super::ask::Id;

/// Whether a sequence has the memory that it was to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Growth {
    /// It has.
    Done,
    /// Not now; it has what it had before.
    Short,
    /// Not now, but others are about to give some back; it has what it had before.
    Coming,
}

/// Memory of one model's sequences.
///
/// A sequence that is admitted is first asked for its cached prefix, then grows, and at last is
/// released; it may be admitted again later. Memory of a step that is on its way may be released
/// too: who implements this sees to it that it gets no other content before that step has ended.
pub trait Blocks {
    /// The most tokens that one sequence can ever have memory for, if no other has any.
    ///
    /// It does not change. While no sequence of the model runs, and no other model presses,
    /// [`grow`](Self::grow) up to so many tokens succeeds.
    fn sequence_tokens_max(&self) -> usize;

    /// Gives a sequence what of its first tokens is in the prefix cache; returns how many tokens
    /// that is: fewer than it has, as at least one must be computed.
    ///
    /// Comes once each time that the sequence is admitted, before it grows. If it then gets no
    /// memory for its first chunk it is released and asked for again in a later plan.
    fn cached_prefix(&mut self, id: Id) -> usize;

    /// Gives a sequence memory for so many tokens in all, those that it has memory for included.
    ///
    /// [`Coming`](Growth::Coming) is for a limited time: if none comes, it says
    /// [`Short`](Growth::Short) then.
    fn grow(&mut self, id: Id, tokens: usize) -> Growth;

    /// Takes back all memory of a sequence. Its prefix may stay in the cache.
    fn release(&mut self, id: Id);
}
