//! Pages that give up all their memory and are to have it again.

use super::{ChunkState, Pages};
use crate::engine::books::intervals::Intervals;
use core::ops::Range;

impl<M> Pages<M> {
    /// A chunk that cannot be taken from its place now: its pages, its state, and whether it is
    /// shared.
    pub(crate) fn first_unready(&self) -> Option<(Range<usize>, ChunkState, bool)> {
        let unready = |state, shared| state != ChunkState::Backed || shared;
        let mut chunks = self.chunks.iter();
        let (first, chunk) = chunks.find(|(_, chunk)| unready(chunk.state, chunk.shared))?;
        Some((first..first + chunk.pages(), chunk.state, chunk.shared))
    }

    /// First pages of all chunks.
    pub(crate) fn firsts(&self) -> Vec<usize> {
        self.chunks.iter().map(|(first, _)| first).collect()
    }

    /// All chunks were taken out ([`depart`](Self::depart)) and unmapped. Empties the books, and
    /// returns the bytes that were live.
    pub(crate) fn fall_asleep(&mut self) -> Intervals {
        let generation = self.generation;
        let asleep = core::mem::replace(self, Self::new(self.page_bytes));
        self.generation = generation;
        debug_assert!(asleep.pending.is_empty());
        debug_assert!(
            asleep
                .chunks
                .iter()
                .all(|(_, chunk)| chunk.memory.is_none())
        );
        asleep.live
    }

    /// How often memory was taken from behind pages, or replaced.
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }
}
