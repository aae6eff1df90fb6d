//! Pages counted by state, and lists of what can be given up.

use super::chunk::{Chunk, ChunkState};
use std::collections::{BTreeSet, VecDeque};

/// Kept as chunks change, so that no call walks them to count.
#[derive(Debug, Default)]
pub(super) struct Counts {
    /// Pages by chunk state, in the order of the enum.
    by_state: [usize; 9],
    /// Those of them in shared chunks.
    shared: [usize; 9],
    /// First pages of the parked chunks, except those made ahead, in the order in which they were
    /// parked. Entries that are out of date stay until they are met, or until there are many:
    /// taking a chunk back is to cost little.
    parked: VecDeque<usize>,
    parked_chunks: usize,
    /// First pages of the chunks made ahead that no allocation has taken.
    ahead: BTreeSet<usize>,
    ahead_pages: usize,
    /// First pages of the parked chunks that are shared.
    leaving: BTreeSet<usize>,
}

impl Counts {
    /// Pages of chunks in a state.
    pub(super) fn pages(&self, state: ChunkState) -> usize {
        self.by_state[state as usize]
    }

    /// The same without shared chunks.
    pub(super) fn own_pages(&self, state: ChunkState) -> usize {
        self.by_state[state as usize] - self.shared[state as usize]
    }

    /// Pages of shared chunks.
    pub(super) fn shared_pages(&self) -> usize {
        self.shared.iter().sum()
    }

    pub(super) fn leaving(&self) -> &BTreeSet<usize> {
        &self.leaving
    }

    /// Pages made ahead, which are parked.
    pub(super) fn ahead_pages(&self) -> usize {
        self.ahead_pages
    }

    pub(super) fn ahead(&self) -> &BTreeSet<usize> {
        &self.ahead
    }

    /// Where parked chunks may begin, the one parked first before the others; some may be parked no
    /// longer, and some may be named again.
    pub(super) fn maybe_parked(&self) -> impl Iterator<Item = usize> + '_ {
        self.parked.iter().copied()
    }

    /// Forgets the first of [`maybe_parked`](Self::maybe_parked) that are parked no longer.
    pub(super) fn forget_while(&mut self, mut out_of_date: impl FnMut(usize) -> bool) {
        while self.parked.front().is_some_and(|first| out_of_date(*first)) {
            self.parked.pop_front();
        }
    }

    /// Whether the list of parked chunks is mostly out of date.
    pub(super) fn is_overgrown(&self) -> bool {
        self.parked.len() > 2 * self.parked_chunks + 64
    }

    /// Keeps those parked chunks of the list that are, once each.
    pub(super) fn tidy(&mut self, is_parked: impl Fn(usize) -> bool) {
        let mut seen = BTreeSet::new();
        self.parked
            .retain(|first| is_parked(*first) && seen.insert(*first));
    }

    pub(super) fn add<M>(&mut self, chunk: &Chunk<M>) {
        self.by_state[chunk.state as usize] += chunk.pages();
    }

    /// From now on a chunk is shared, or is not.
    pub(super) fn set_shared<M>(&mut self, first: usize, chunk: &mut Chunk<M>, shared: bool) {
        let state = chunk.state;
        self.remove(first, chunk);
        // Not parked while it is changed, so that the lists follow.
        (chunk.state, chunk.shared) = (ChunkState::Filling, shared);
        self.by_state[chunk.state as usize] += chunk.pages();
        if shared {
            self.shared[chunk.state as usize] += chunk.pages();
        }
        self.change(first, chunk, state);
    }

    pub(super) fn remove<M>(&mut self, first: usize, chunk: &Chunk<M>) {
        self.by_state[chunk.state as usize] -= chunk.pages();
        if chunk.shared {
            self.shared[chunk.state as usize] -= chunk.pages();
        }
        if chunk.state == ChunkState::Parked {
            self.unpark(first, chunk);
        }
    }

    /// Changes the state of the chunk that begins at `first`.
    pub(super) fn change<M>(&mut self, first: usize, chunk: &mut Chunk<M>, state: ChunkState) {
        self.by_state[chunk.state as usize] -= chunk.pages();
        self.by_state[state as usize] += chunk.pages();
        if chunk.shared {
            self.shared[chunk.state as usize] -= chunk.pages();
            self.shared[state as usize] += chunk.pages();
        }
        let before = core::mem::replace(&mut chunk.state, state);
        match (before == ChunkState::Parked, state == ChunkState::Parked) {
            (false, true) if chunk.ahead => {
                self.ahead_pages += chunk.pages();
                self.ahead.insert(first);
            }
            (false, true) if chunk.shared => _ = self.leaving.insert(first),
            (false, true) => {
                self.parked_chunks += 1;
                self.parked.push_back(first);
            }
            (true, false) => self.unpark(first, chunk),
            _ => {}
        }
    }

    fn unpark<M>(&mut self, first: usize, chunk: &Chunk<M>) {
        if chunk.ahead {
            self.ahead_pages -= chunk.pages();
            self.ahead.remove(&first);
        } else if chunk.shared {
            self.leaving.remove(&first);
        } else {
            self.parked_chunks -= 1;
        }
    }
}
