//! What the leases of a range say about its bytes and pages.

use super::Range;
use crate::MemoryParts;
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
        self.pages.live_pages() - self.leases.pages(self.pages.live(), self.page_bytes)
    }

    /// What its pages are.
    pub(crate) fn parts(&self) -> MemoryParts {
        let mut parts = self.pages.parts();
        if self.waits_for_leases() {
            parts.leased_bytes =
                self.leases.pages(self.pages.live(), self.page_bytes) * self.page_bytes;
            parts.live_page_bytes -= parts.leased_bytes;
        }
        parts
    }

    /// Frees bytes that are live, except those that are leased. Adds the chunks that are unused now
    /// to `unused`.
    pub(crate) fn free(&mut self, bytes: &ops::Range<usize>, unused: &mut Vec<usize>) {
        if self.leases.is_empty() {
            return self.pages.release(bytes, unused);
        }
        for part in self.leases.free(bytes) {
            self.pages.release(&part, unused);
        }
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

    /// Frees what was freed before and is leased no longer. Returns whether there was any, and the
    /// chunks that are unused now.
    pub(crate) fn sweep_leases(&mut self) -> (bool, Vec<usize>) {
        let parts = self.leases.sweep();
        let mut unused = Vec::new();
        for part in &parts {
            self.pages.release(part, &mut unused);
        }
        (!parts.is_empty(), unused)
    }
}
