//! What the leases of a range say about its bytes and pages.

use super::Range;
use crate::{Mapping, MemoryParts};
use core::ops;

impl Range {
    /// Whether all of the bytes are live and the owner has not freed them.
    pub(crate) fn is_live(&self, bytes: &ops::Range<usize>) -> bool {
        self.pages.live().contains(bytes) && !self.leases.freed().overlaps(bytes)
    }

    /// Whether some of the bytes were freed and wait for a lease to end.
    pub(crate) fn is_held_by_lease(&self, bytes: &ops::Range<usize>) -> bool {
        self.leases.freed().overlaps(bytes)
    }

    /// Whether bytes that were freed wait for leases.
    pub(crate) fn waits_for_leases(&self) -> bool {
        !self.leases.freed().is_empty()
    }

    /// Whether any of these pages is leased.
    pub(crate) fn is_leased(&self, pages: &ops::Range<usize>) -> bool {
        let bytes = pages.start * self.page_bytes..pages.end * self.page_bytes;
        self.leases.overlap(&bytes)
    }

    /// Bytes that the owner has and did not free.
    pub(crate) fn owned_bytes(&self) -> usize {
        self.pages.live().total() - self.leases.freed().total()
    }

    /// Pages in which the owner has bytes.
    pub(crate) fn owned_pages(&self) -> usize {
        self.pages.live_pages() - self.leased_pages
    }

    /// What its pages are, except those in shared chunks.
    pub(crate) fn parts(&self) -> MemoryParts {
        let mut parts = self.pages.parts();
        if self.waits_for_leases() {
            let leased_pages = self.leased_pages - self.leased_shared_pages;
            parts.leased_bytes = leased_pages * self.page_bytes;
            parts.live_page_bytes -= parts.leased_bytes;
        }
        parts
    }

    /// Frees bytes that are live, except those that are leased. Adds the chunks that are unused now
    /// to `unused`.
    pub(crate) fn free(&mut self, bytes: &ops::Range<usize>, unused: &mut Vec<usize>) {
        if self.leases.is_empty() {
            return self.with_leased_pages(bytes, |range| range.pages.release(bytes, unused));
        }
        self.with_leased_pages(bytes, |range| {
            for part in range.leases.free(bytes) {
                range.pages.release(&part, unused);
            }
        });
    }

    /// Changes what of some bytes is live, or was freed under a lease, and counts leased pages.
    pub(crate) fn with_leased_pages<T>(
        &mut self,
        bytes: &ops::Range<usize>,
        change: impl FnOnce(&mut Self) -> T,
    ) -> T {
        if self.leases.is_empty() && !self.waits_for_leases() {
            return change(self);
        }
        let first = bytes.start / self.page_bytes;
        let pages = first..bytes.end.div_ceil(self.page_bytes);
        let shared_pages = |range: &Self| {
            let chunks = range.pages.shared_chunks(bytes);
            let within = |chunk: ops::Range<usize>| {
                let start = chunk.start.max(pages.start);
                range.count_leased(start..chunk.end.min(pages.end))
            };
            chunks.map(within).sum::<usize>()
        };
        self.leased_pages -= self.count_leased(pages.clone());
        self.leased_shared_pages -= shared_pages(self);
        let changed = change(self);
        self.leased_pages += self.count_leased(pages.clone());
        self.leased_shared_pages += shared_pages(self);
        changed
    }

    /// How many of these pages are leased, and have no bytes that the owner did not free.
    fn count_leased(&self, pages: ops::Range<usize>) -> usize {
        let live = self.pages.live();
        self.leases.pages(live, self.page_bytes, pages)
    }

    /// Puts chunks of other memory in the place of one that was moved; returns those that are
    /// unused now.
    pub(crate) fn arrive(
        &mut self,
        first: usize,
        chunks: impl IntoIterator<Item = (ops::Range<usize>, Mapping)>,
    ) -> Vec<usize> {
        self.set_shared(first, false);
        self.pages.arrive(first, chunks)
    }

    /// From now on the memory of a chunk is shared, or is the range's alone.
    pub(crate) fn set_shared(&mut self, first: usize, shared: bool) {
        if self.pages.is_shared(first) == shared {
            return;
        }
        let pages = self.pages.chunk_bytes(first) / self.page_bytes;
        let leased_pages = match self.waits_for_leases() {
            true => self.count_leased(first..first + pages),
            false => 0,
        };
        match shared {
            true => self.leased_shared_pages += leased_pages,
            false => self.leased_shared_pages -= leased_pages,
        }
        self.pages.set_shared(first, shared);
    }

    /// Frees all that the owner has, except what is leased.
    pub(crate) fn free_all(&mut self) -> Vec<usize> {
        let live: Vec<_> = self.pages.live().iter().collect();
        let owned: Vec<_> = (live.into_iter())
            .flat_map(|part| self.leases.freed().gaps(part).collect::<Vec<_>>())
            .collect();
        let mut unused = Vec::new();
        owned.iter().for_each(|part| self.free(part, &mut unused));
        unused
    }

    /// Frees what was freed before and is leased no longer, at most so many parts. Returns how
    /// many. Adds the chunks that are unused now to `unused`.
    pub(crate) fn sweep_leases(&mut self, at_most: usize, unused: &mut Vec<usize>) -> usize {
        for swept in 0..at_most {
            let Some(part) = self.leases.next_over() else {
                return swept;
            };
            self.with_leased_pages(&part, |range| {
                range.leases.take_over();
                range.pages.release(&part, unused);
            });
        }
        at_most
    }
}
