//! How far a sequence has come.

use super::ask::{Ask, Id};
use super::blocks::{Blocks, Growth};
use super::step::Chunk;

#[derive(Debug)]
pub(super) struct Sequence {
    ask: Ask,
    generated: usize,
    /// Tokens that are computed or came from the prefix cache: all but the last, or fewer.
    computed: usize,
    /// Tokens that it has memory for.
    held: usize,
    /// Tokens that the step on its way computes.
    planned: usize,
}

impl Sequence {
    pub(super) fn new(ask: Ask) -> Self {
        Self {
            ask,
            generated: 0,
            computed: 0,
            held: 0,
            planned: 0,
        }
    }

    pub(super) fn id(&self) -> Id {
        self.ask.id
    }

    pub(super) fn held(&self) -> usize {
        self.held
    }

    /// Tokens that are to be computed before the next is generated.
    fn left(&self) -> usize {
        self.ask.prompt_tokens + self.generated - self.computed
    }

    /// Whether only the token is left that was generated last.
    pub(super) fn decodes(&self) -> bool {
        self.generated > 0 && self.left() == 1
    }

    /// Takes what the prefix cache has of it; returns how many tokens that spares.
    pub(super) fn take_prefix(&mut self, blocks: &mut impl Blocks) -> usize {
        let cached = blocks.cached_prefix(self.id());
        // Without a token to compute, none would be generated.
        self.computed = cached.min(self.left() - 1);
        self.held = cached;
        self.computed
    }

    /// Plans the next tokens, at most so many; the error is what memory it got instead.
    pub(super) fn plan(
        &mut self,
        tokens_max: usize,
        blocks: &mut impl Blocks,
    ) -> Result<Chunk, Growth> {
        let (id, first) = (self.id(), self.computed);
        let count = self.left().min(tokens_max);
        match blocks.grow(id, first + count) {
            Growth::Done => {}
            growth => return Err(growth),
        }
        self.held = self.held.max(first + count);
        self.planned = count;
        Ok(Chunk {
            id,
            first,
            count,
            is_last: count == self.left(),
        })
    }

    /// Forgets what was planned.
    pub(super) fn unplan(&mut self) {
        self.planned = 0;
    }

    /// Counts what was planned as computed; returns how many tokens that is, and whether the
    /// sequence has a new token after it.
    pub(super) fn advance(&mut self) -> (usize, bool) {
        let count = core::mem::take(&mut self.planned);
        self.computed += count;
        let is_new = count > 0 && self.left() == 0;
        self.generated += usize::from(is_new);
        (count, is_new)
    }

    pub(super) fn has_all(&self) -> bool {
        self.generated >= self.ask.generated_max
    }

    /// Gives its memory back. All its tokens are to be computed again.
    pub(super) fn release(&mut self, blocks: &mut impl Blocks) {
        blocks.release(self.id());
        (self.computed, self.held, self.planned) = (0, 0, 0);
    }
}
