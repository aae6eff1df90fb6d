//! What pins and leases keep where it is, and what may be given up.

use super::Range;
use crate::engine::books::pages::ChunkState;
use core::ops;
use std::collections::BTreeSet;

impl Range {
    fn is_pinned(&self, pages: &ops::Range<usize>) -> bool {
        let mut pins = self.pins.values();
        pins.any(|pin| pin.start < pages.end && pages.start < pin.end)
    }

    /// Whether a pin keeps the chunk that begins at this page from being unmapped.
    pub(crate) fn is_chunk_pinned(&self, first: usize) -> bool {
        let pages = self.pages.chunk_bytes(first) / self.page_bytes;
        self.is_pinned(&(first..first + pages))
    }

    /// Whether a pin or a lease keeps the chunk that begins at this page from being moved.
    pub(crate) fn is_chunk_held(&self, first: usize) -> bool {
        let pages = self.pages.chunk_bytes(first) / self.page_bytes;
        let pages = first..first + pages;
        self.is_pinned(&pages) || self.is_leased(&pages)
    }

    /// A parked chunk that may be unmapped.
    pub(crate) fn spare_parked(&mut self) -> Option<usize> {
        if self.pins.is_empty() {
            return self.pages.first_parked();
        }
        let mut parked = self.pages.parked();
        parked.find(|first| !self.is_chunk_pinned(*first))
    }

    /// A mapping of a shared chunk that is only to be unmapped, and that no pin keeps.
    pub(crate) fn leaving(&self) -> Option<usize> {
        let mut leaving = self.pages.leaving();
        leaving.find(|first| self.pins.is_empty() || !self.is_chunk_pinned(*first))
    }

    /// First pages of the shared chunks behind these pages in which no byte is live, and that no
    /// pin keeps.
    pub(crate) fn unused_shared(
        &self,
        pages: &ops::Range<usize>,
    ) -> impl Iterator<Item = usize> + '_ {
        let bytes = pages.start * self.page_bytes..pages.end * self.page_bytes;
        let firsts = self.pages.shared_chunks(&bytes).map(|chunk| chunk.start);
        firsts.filter(|first| {
            let state = self.pages.state_of(*first);
            let is_unused = matches!(state, Some(ChunkState::Retiring | ChunkState::Parked));
            is_unused && !self.is_chunk_pinned(*first)
        })
    }

    /// What is parked and may be unmapped, in bytes.
    pub(crate) fn spare_parked_bytes(&self) -> usize {
        let parked_bytes = self.pages.parts().parked_bytes;
        if self.pins.is_empty() {
            return parked_bytes;
        }
        let parked: BTreeSet<_> = self.pages.parked().collect();
        let pinned = parked.into_iter();
        let pinned = pinned.filter(|first| self.is_chunk_pinned(*first));
        let pinned = pinned.map(|first| self.pages.chunk_bytes(first));
        parked_bytes - pinned.sum::<usize>()
    }

    /// Whether it is closed and can be ended: no pin or lease keeps what is left of it.
    pub(crate) fn is_ending(&self) -> bool {
        self.closed && self.pins.is_empty() && !self.waits_for_leases()
    }
}
