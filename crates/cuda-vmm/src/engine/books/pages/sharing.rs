//! Chunks whose memory other ranges map too. They are in none of the range's parts.

use super::relocation::PartlyLive;
use super::{ChunkState, Pages};
use core::ops::Range;

impl<M> Pages<M> {
    /// Whether the memory of the chunk that begins at this page is shared.
    pub(crate) fn is_shared(&self, first: usize) -> bool {
        self.chunks.get(first).is_some_and(|chunk| chunk.shared)
    }

    /// Whether any chunk is shared.
    pub(crate) fn any_shared(&self) -> bool {
        self.counts.shared_pages() > 0
    }

    /// Pages of shared chunks.
    pub(crate) fn shared_pages(&self) -> usize {
        self.counts.shared_pages()
    }

    /// The parts of these bytes that no shared chunk backs, in order.
    pub(super) fn outside_shared(&self, bytes: Range<usize>) -> Vec<Range<usize>> {
        let (mut parts, mut start) = (Vec::new(), bytes.start);
        for chunk in self.shared_chunks(&bytes) {
            let chunk = self.bytes_of(&chunk);
            parts.push(start..chunk.start.max(start));
            start = chunk.end;
        }
        parts.push(start..bytes.end.max(start));
        parts.retain(|part| !part.is_empty());
        parts
    }

    /// The pages of each shared chunk that backs some of these bytes.
    pub(crate) fn shared_chunks<'a>(
        &'a self,
        bytes: &Range<usize>,
    ) -> impl Iterator<Item = Range<usize>> + use<'a, M> {
        let pages = match self.any_shared() {
            true => self.pages_of(bytes),
            false => 0..0,
        };
        let shared = self.chunks_of(pages).filter(|(_, chunk)| chunk.shared);
        shared.map(|(first, chunk)| first..first + chunk.pages())
    }

    /// The pages of the chunks from `page` on that lie in these bytes as a whole and have no byte
    /// that is not live. Others can be made to share them.
    pub(crate) fn whole_chunks(
        &self,
        bytes: &Range<usize>,
        page: usize,
    ) -> impl Iterator<Item = Range<usize>> + '_ {
        let pages = bytes.start.div_ceil(self.page_bytes)..bytes.end / self.page_bytes;
        let start = page.max(pages.start);
        let chunks = self.chunks.range(start..pages.end.max(start));
        let chunks = chunks.map(|(first, chunk)| (first..first + chunk.pages(), chunk));
        chunks
            .filter(move |(of_chunk, chunk)| {
                chunk.state == ChunkState::Backed
                    && of_chunk.end <= pages.end
                    && self.live.contains(&self.bytes_of(of_chunk))
            })
            .map(|(of_chunk, _)| of_chunk)
    }

    /// Whether the driver refused to unmap a chunk, or to map it again.
    pub(crate) fn is_any_refused(&self) -> bool {
        let refused = [ChunkState::Quarantined, ChunkState::Stranded];
        refused.iter().any(|state| self.any_in_state(*state))
    }

    /// The memory of a chunk, unless a thread that works on the chunk has it.
    pub(crate) fn memory(&self, first: usize) -> Option<&M> {
        self.chunks.get(first)?.memory.as_ref()
    }

    /// Whether a thread that works on the chunk has its memory.
    pub(crate) fn is_in_hand(&self, first: usize) -> bool {
        let state = self.state_of(first);
        state.is_some_and(|state| {
            matches!(
                state,
                ChunkState::Filling
                    | ChunkState::Draining
                    | ChunkState::Relocating
                    | ChunkState::Restoring
            )
        })
    }

    /// Whether nothing backs these pages and none of their bytes is taken.
    pub(crate) fn are_bare(&self, pages: &Range<usize>) -> bool {
        self.chunks_of(pages.clone()).next().is_none() && !self.is_taken(&self.bytes_of(pages))
    }

    /// Whether some of the bytes are live or about to be.
    pub(crate) fn has_taken(&self, bytes: &Range<usize>) -> bool {
        self.is_taken(bytes)
    }

    /// From now on the memory of a chunk is shared, or is the range's alone.
    pub(crate) fn set_shared(&mut self, first: usize, shared: bool) {
        let Some(chunk) = self.chunks.get_mut(first) else {
            return;
        };
        if chunk.shared == shared {
            return;
        }
        let end = first + chunk.pages();
        if shared {
            let before = match self.counts.shared_pages() {
                0 => 0,
                _ => self.shared_end,
            };
            self.shared_end = before.max(end);
        }
        self.counts.set_shared(first, chunk, shared);
        let live_pages = chunk.live_pages as usize;
        match shared {
            true => self.shared_live_pages += live_pages,
            false => self.shared_live_pages -= live_pages,
        }
    }

    /// Memory of another range is being mapped at pages of which [`are_bare`](Self::are_bare)
    /// holds, and all their bytes are to be live.
    pub(crate) fn begin_sharing(&mut self, pages: Range<usize>) {
        self.pending.insert(self.bytes_of(&pages));
        let first = pages.start;
        self.insert(pages, ChunkState::Filling, None);
        self.set_shared(first, true);
    }

    /// It is mapped.
    pub(crate) fn finish_sharing(&mut self, first: usize, memory: M) {
        debug_assert_eq!(self.state_of(first), Some(ChunkState::Filling));
        self.set_state(first, ChunkState::Backed);
        let Some(chunk) = self.chunks.get_mut(first) else {
            return;
        };
        chunk.memory = Some(memory);
        chunk.taken();
        chunk.live_pages = chunk.pages;
        let pages = chunk.pages();
        self.live_pages += pages;
        self.shared_live_pages += pages;
        let bytes = self.bytes_of(&(first..first + pages));
        self.pending.remove(&bytes);
        self.live.insert(bytes);
    }

    /// It is not mapped after all, or could not be made accessible and is mapped still.
    pub(crate) fn abort_sharing(&mut self, first: usize, stuck: Option<M>) {
        debug_assert_eq!(self.state_of(first), Some(ChunkState::Filling));
        let pages = self.chunks.get(first).map_or(0, |chunk| chunk.pages());
        self.pending.remove(&self.bytes_of(&(first..first + pages)));
        match stuck {
            None => self.remove(first),
            Some(memory) => {
                self.set_state(first, ChunkState::Quarantined);
                if let Some(chunk) = self.chunks.get_mut(first) {
                    chunk.memory = Some(memory);
                }
            }
        }
    }

    /// First pages of the shared chunks that the device has finished with. They are to be unmapped.
    pub(crate) fn leaving(&self) -> impl Iterator<Item = usize> + '_ {
        self.counts.leaving().iter().copied()
    }

    /// The shared chunk that begins at this page, if its live pages can be moved to memory of the
    /// range's own. The caller checks what else keeps it in its place.
    pub(crate) fn to_make_private(&self, first: usize) -> Option<PartlyLive> {
        let chunk = self.chunks.get(first)?;
        (chunk.shared && chunk.state == ChunkState::Backed).then(|| self.pieces(first, chunk))
    }
}
