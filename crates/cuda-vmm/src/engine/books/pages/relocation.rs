//! Live pages of a chunk that move to other memory, at unchanged addresses.

use super::{ChunkState, Pages};
use crate::engine::books::policy::cut;
use core::ops::Range;

/// A chunk that holds pages with live bytes and pages without, and may be moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PartlyLive {
    /// Its first page, by which it is known.
    pub(crate) first: usize,
    pub(crate) live_page_bytes: usize,
    pub(crate) slack_bytes: usize,
    /// The pages with live bytes, cut into the chunks that are to hold them.
    pub(crate) pieces: Vec<Range<usize>>,
}

/// States of chunks whose live bytes cannot be used.
const OUT_OF_REACH: [ChunkState; 2] = [ChunkState::Stranded, ChunkState::Restoring];

impl<M> Pages<M> {
    /// All chunks that may be moved, in the order of their pages.
    pub(crate) fn partly_live(&self) -> impl Iterator<Item = PartlyLive> + '_ {
        (self.chunks.iter()).filter_map(|(first, _)| self.partly_live_at(first))
    }

    /// The chunk that begins at this page, if it is partly live and may be moved: no thread works
    /// on it, or is about to take bytes of it, and it is not shared. The caller checks what else
    /// keeps a chunk in its place.
    pub(crate) fn partly_live_at(&self, first: usize) -> Option<PartlyLive> {
        let chunk = self.chunks.get(first)?;
        let pages = first..first + chunk.pages();
        let is_partly_live = chunk.live_pages > 0 && chunk.live_pages < chunk.pages;
        if chunk.state != ChunkState::Backed
            || chunk.shared
            || !is_partly_live
            || self.pending.overlaps(&self.bytes_of(&pages))
        {
            return None;
        }
        Some(self.pieces(first, chunk))
    }

    /// The pages with live bytes of the chunk that begins at this page.
    pub(super) fn pieces(&self, first: usize, chunk: &super::Chunk<M>) -> PartlyLive {
        let pages = first..first + chunk.pages();
        let live_page_bytes = chunk.live_pages as usize * self.page_bytes;
        let largest = 1 << pages.len().ilog2();
        let mut pieces = Vec::new();
        let mut at = pages.start;
        while at < pages.end {
            let live = (at..pages.end).take_while(|page| self.is_page_live(*page));
            let run = at..at + live.count();
            at = run.end + 1;
            pieces.extend(cut(run, largest));
        }
        PartlyLive {
            first,
            live_page_bytes,
            slack_bytes: pages.len() * self.page_bytes - live_page_bytes,
            pieces,
        }
    }

    /// Hands out the memory of a chunk whose pages are to be moved. They stay live and may be freed
    /// meanwhile.
    pub(crate) fn depart(&mut self, first: usize) -> Option<M> {
        if self.state_of(first)? != ChunkState::Backed {
            return None;
        }
        self.set_state(first, ChunkState::Relocating);
        self.generation += 1;
        self.chunks.get_mut(first)?.memory.take()
    }

    /// Puts chunks of other memory in the place of one that was moved. Returns those that are
    /// unused because their bytes were freed meanwhile; they are now retiring.
    pub(crate) fn arrive(
        &mut self,
        first: usize,
        chunks: impl IntoIterator<Item = (Range<usize>, M)>,
    ) -> Vec<usize> {
        debug_assert_eq!(self.state_of(first), Some(ChunkState::Relocating));
        let Some(old) = self.chunks.remove(first) else {
            return Vec::new();
        };
        self.counts.remove(first, &old);
        if old.shared {
            self.shared_live_pages -= old.live_pages as usize;
        }
        let place = self.bytes_of(&(first..first + old.pages()));
        for (pages, memory) in chunks {
            let live = pages.clone().filter(|page| self.is_page_live(*page));
            let live_pages = u32::try_from(live.count()).unwrap_or(u32::MAX);
            let first = pages.start;
            self.insert(pages, ChunkState::Backed, Some(memory));
            if let Some(chunk) = self.chunks.get_mut(first) {
                chunk.live_pages = live_pages;
            }
        }
        let mut unused = Vec::new();
        self.retire_unused(&place, &(0..0), &mut unused);
        unused
    }

    /// Ends a move that failed: the chunk's memory is in its place again. Returns the chunk if it
    /// is unused, because its bytes were freed meanwhile; it is now retiring.
    pub(crate) fn come_back(&mut self, first: usize, memory: M) -> Vec<usize> {
        debug_assert!(self.is_moved(first));
        self.set_state(first, ChunkState::Backed);
        let Some(chunk) = self.chunks.get_mut(first) else {
            return Vec::new();
        };
        chunk.memory = Some(memory);
        let place = first..first + chunk.pages();
        let mut unused = Vec::new();
        self.retire_unused(&self.bytes_of(&place), &(0..0), &mut unused);
        unused
    }

    /// Ends a move that failed, whose memory is not in its place again.
    pub(crate) fn strand(&mut self, first: usize) {
        debug_assert!(self.is_moved(first));
        self.set_state(first, ChunkState::Stranded);
    }

    /// Marks a stranded chunk as being worked on.
    pub(crate) fn resume(&mut self, first: usize) {
        debug_assert_eq!(self.state_of(first), Some(ChunkState::Stranded));
        self.set_state(first, ChunkState::Restoring);
    }

    /// Whether pages are being made or moved. A thread that closes the range waits for that.
    pub(crate) fn is_worked_on(&self) -> bool {
        let worked_on = [
            ChunkState::Filling,
            ChunkState::Relocating,
            ChunkState::Restoring,
        ];
        worked_on.iter().any(|state| self.any_in_state(*state))
    }

    /// Whether some of the bytes lie in a stranded chunk.
    pub(crate) fn is_stranded(&self, bytes: &Range<usize>) -> bool {
        let mut chunks = self.chunks_of(self.pages_of(bytes));
        OUT_OF_REACH.iter().any(|state| self.any_in_state(*state))
            && chunks.any(|(_, chunk)| OUT_OF_REACH.contains(&chunk.state))
    }

    /// Live pages that are out of reach, except those in shared chunks.
    pub(super) fn stranded_live_pages(&self) -> usize {
        let stranded = OUT_OF_REACH.iter().flat_map(|state| self.in_state(*state));
        let live = stranded.filter_map(|first| self.chunks.get(first));
        let live = live.filter(|chunk| !chunk.shared);
        live.map(|chunk| chunk.live_pages as usize).sum()
    }

    /// Whether a thread has the memory of a chunk whose pages move, or are to be put back.
    fn is_moved(&self, first: usize) -> bool {
        let state = self.state_of(first);
        matches!(state, Some(ChunkState::Relocating | ChunkState::Restoring))
    }

    fn is_page_live(&self, page: usize) -> bool {
        self.live.overlaps(&self.bytes_of(&(page..page + 1)))
    }
}

#[cfg(test)]
mod tests;
