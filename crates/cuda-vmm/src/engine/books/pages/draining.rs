//! Chunks that are given back, and what becomes of them if the driver refuses.

use super::{ChunkState, Contents, Pages};

impl<M> Pages<M> {
    /// A draining chunk is to be parked again when the device has overwritten it, or done whatever
    /// it does.
    pub(crate) fn retire_drained(&mut self, first: usize, memory: M, overwritten: bool) {
        debug_assert_eq!(self.state_of(first), Some(ChunkState::Draining));
        self.set_state(first, ChunkState::Retiring);
        if let Some(chunk) = self.chunks.get_mut(first) {
            chunk.memory = Some(memory);
            chunk.contents = if overwritten {
                Contents::Clean
            } else {
                Contents::Stuck
            };
        }
    }

    /// What is in a parked chunk.
    pub(crate) fn contents(&self, first: usize) -> Contents {
        let chunk = self.chunks.get(first);
        chunk.map_or(Contents::Unknown, |chunk| chunk.contents)
    }

    /// Hands out the memory of a parked or quarantined chunk to be unmapped.
    pub(crate) fn drain(&mut self, first: usize) -> Option<M> {
        let state = self.state_of(first)?;
        if !matches!(state, ChunkState::Parked | ChunkState::Quarantined) {
            return None;
        }
        self.set_state(first, ChunkState::Draining);
        self.generation += 1;
        self.chunks.get_mut(first)?.memory.take()
    }

    /// The draining chunk was unmapped.
    pub(crate) fn drained(&mut self, first: usize) {
        debug_assert_eq!(self.state_of(first), Some(ChunkState::Draining));
        self.remove(first);
    }

    /// The draining chunk could not be unmapped.
    pub(crate) fn quarantine(&mut self, first: usize, memory: M) {
        debug_assert_eq!(self.state_of(first), Some(ChunkState::Draining));
        self.set_state(first, ChunkState::Quarantined);
        if let Some(chunk) = self.chunks.get_mut(first) {
            chunk.memory = Some(memory);
        }
    }

    /// Empties the books and hands out all memory that is in them: what the device may still use,
    /// and what it has finished with.
    pub(crate) fn take_all(&mut self) -> (Vec<M>, Vec<M>) {
        let page_bytes = self.page_bytes;
        let all = core::mem::replace(self, Self::new(page_bytes));
        let (mut in_use, mut finished) = (Vec::new(), Vec::new());
        for chunk in all.chunks.into_values() {
            match chunk.state {
                ChunkState::Parked | ChunkState::Quarantined => finished.extend(chunk.memory),
                _ => in_use.extend(chunk.memory),
            }
        }
        (in_use, finished)
    }
}
