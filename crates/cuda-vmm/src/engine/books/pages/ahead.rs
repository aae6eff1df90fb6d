//! Chunks that are made before any allocation needs them.

use super::{ChunkState, Contents, Pages};
use core::ops::Range;

impl<M> Pages<M> {
    /// A run of pages that nothing backs is being made ahead.
    pub(crate) fn begin_ahead(&mut self, run: Range<usize>) {
        self.insert(run, ChunkState::Filling, None);
    }

    /// It was made, or what could not be undone is left, or nothing.
    pub(crate) fn finish_ahead(
        &mut self,
        first: usize,
        made: Option<(Range<usize>, M)>,
        works: bool,
    ) {
        self.remove(first);
        let Some((pages, memory)) = made else {
            return;
        };
        if !works {
            return self.insert(pages, ChunkState::Quarantined, Some(memory));
        }
        let first = pages.start;
        self.insert(pages, ChunkState::Filling, Some(memory));
        if let Some(chunk) = self.chunks.get_mut(first) {
            chunk.ahead = true;
            chunk.contents = Contents::Clean;
        }
        self.set_state(first, ChunkState::Parked);
    }

    /// First pages of the chunks made ahead.
    pub(crate) fn ahead(&self) -> impl DoubleEndedIterator<Item = usize> + '_ {
        self.counts.ahead().iter().copied()
    }

    /// The pages of the chunk that begins at `first`.
    pub(crate) fn chunk_at(&self, first: usize) -> Range<usize> {
        first..first + self.chunks.get(first).map_or(0, |chunk| chunk.pages())
    }

    /// A chunk made ahead that lies wholly outside these pages.
    pub(crate) fn ahead_outside(&self, pages: &Range<usize>) -> Option<usize> {
        let before = self.counts.ahead().first().copied();
        let before = before.filter(|first| {
            let chunk = self.chunks.get(*first);
            chunk.is_some_and(|chunk| first + chunk.pages() <= pages.start)
        });
        let after = || {
            self.counts
                .ahead()
                .last()
                .copied()
                .filter(|first| *first >= pages.end)
        };
        before.or_else(after)
    }
}
