//! Which bytes of a range are live, and which chunk backs which pages.
//!
//! Pure bookkeeping over a payload `M`, which is a mapping in production and a number in tests. A
//! page's state follows from two facts, so it is not stored: a page is live while any byte in it
//! is, and otherwise is in the state of the chunk that backs it, or free if none does.

mod ahead;
mod asleep;
mod chunk;
mod counts;
mod draining;
pub(crate) mod relocation;
mod sharing;

pub(crate) use chunk::{ChunkState, Contents};

use super::intervals::{Around, Intervals};
use super::sorted::{Position, SortedMap};
use crate::MemoryParts;
use chunk::Chunk;
use core::ops::Range;
use counts::Counts;

/// What an allocation would find.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Survey {
    /// Runs of pages that nothing backs.
    pub(crate) missing: Vec<Range<usize>>,
    /// First pages of parked chunks.
    pub(crate) parked: Vec<usize>,
    /// First pages of retiring chunks. Such bytes may be taken only if their new users come after
    /// the device's work.
    pub(crate) retiring: Vec<usize>,
    /// First pages of shared chunks that retire, or are parked until they are unmapped. They are
    /// never used again.
    pub(crate) leaving: Vec<usize>,
    /// Whether some pages are in shared chunks that are in use.
    pub(crate) shared: bool,
    /// Whether another thread fills, drains or moves some of the pages.
    pub(crate) busy: bool,
    /// Whether some pages are in quarantine.
    pub(crate) quarantined: bool,
}

impl Survey {
    pub(crate) fn missing_pages(&self) -> usize {
        self.missing.iter().map(Range::len).sum()
    }

    /// First pages of the chunks that are there and have no live byte.
    pub(crate) fn unused(&self) -> impl Iterator<Item = usize> + '_ {
        self.parked.iter().chain(&self.retiring).copied()
    }

    /// Whether all pages are backed or parked, and no thread works on them.
    pub(crate) fn is_there(&self) -> bool {
        let is_ours = self.leaving.is_empty() && !self.shared;
        let is_idle = self.retiring.is_empty() && !self.busy && !self.quarantined;
        self.missing.is_empty() && is_ours && is_idle
    }
}

#[derive(Debug)]
pub(crate) struct Pages<M> {
    page_bytes: usize,
    /// Bytes that are live.
    live: Intervals,
    /// Bytes that are about to be live: their pages are being filled.
    pending: Intervals,
    chunks: SortedMap<Chunk<M>>,
    live_pages: usize,
    /// Those of them in shared chunks.
    shared_live_pages: usize,
    /// No page from this one on is in a shared chunk, if any is.
    shared_end: usize,
    counts: Counts,
    /// How often memory was taken from behind pages, or replaced.
    generation: u64,
}

impl<M> Pages<M> {
    pub(crate) fn new(page_bytes: usize) -> Self {
        Self {
            page_bytes,
            live: Intervals::default(),
            pending: Intervals::default(),
            chunks: SortedMap::default(),
            live_pages: 0,
            shared_live_pages: 0,
            shared_end: 0,
            counts: Counts::default(),
            generation: 0,
        }
    }

    pub(crate) fn live(&self) -> &Intervals {
        &self.live
    }

    pub(crate) fn live_pages(&self) -> usize {
        self.live_pages
    }

    pub(crate) fn chunks(&self) -> usize {
        self.chunks.len()
    }

    /// What the pages are, except those in shared chunks. Leased pages count as live here.
    pub(crate) fn parts(&self) -> MemoryParts {
        let bytes = |state: ChunkState| self.counts.own_pages(state) * self.page_bytes;
        let ahead_bytes = self.counts.ahead_pages() * self.page_bytes;
        let backed_bytes = bytes(ChunkState::Backed) + bytes(ChunkState::Relocating);
        let elsewhere_pages = self.shared_live_pages + self.stranded_live_pages();
        let live_page_bytes = (self.live_pages - elsewhere_pages) * self.page_bytes;
        MemoryParts {
            filling_bytes: bytes(ChunkState::Filling),
            live_page_bytes,
            slack_bytes: backed_bytes - live_page_bytes,
            retiring_bytes: bytes(ChunkState::Retiring) + bytes(ChunkState::Draining),
            parked_bytes: bytes(ChunkState::Parked) - ahead_bytes,
            ahead_bytes,
            quarantined_bytes: bytes(ChunkState::Quarantined)
                + bytes(ChunkState::Stranded)
                + bytes(ChunkState::Restoring),
            // The books of pages know neither leases nor the cache nor other ranges.
            leased_bytes: 0,
            shared_bytes: 0,
            cached_bytes: 0,
        }
    }

    /// The first page of `pages` that nothing backs or is about to.
    pub(crate) fn first_missing(&self, pages: Range<usize>) -> Option<usize> {
        let mut at = pages.start;
        for (first, chunk) in self.chunks_of(pages.clone()) {
            if at < first {
                break;
            }
            at = first + chunk.pages();
        }
        (at < pages.end).then_some(at)
    }

    /// First pages of the parked chunks, except those made ahead; the one parked first before the
    /// others. Some may be named twice.
    pub(crate) fn parked(&self) -> impl Iterator<Item = usize> + '_ {
        let maybe = self.counts.maybe_parked();
        maybe.filter(|first| self.chunks.get(*first).is_some_and(Chunk::is_parked))
    }

    /// The chunk that was parked before all others, except those made ahead.
    pub(crate) fn first_parked(&mut self) -> Option<usize> {
        let chunks = &self.chunks;
        self.counts
            .forget_while(|first| !chunks.get(first).is_some_and(Chunk::is_parked));
        self.counts.maybe_parked().next()
    }

    /// Whether any chunk is in this state.
    pub(crate) fn any_in_state(&self, state: ChunkState) -> bool {
        self.counts.pages(state) > 0
    }

    /// First pages of the chunks in this state. Walks all chunks: for rare states.
    pub(crate) fn in_state(&self, state: ChunkState) -> Vec<usize> {
        if self.counts.pages(state) == 0 {
            return Vec::new();
        }
        let of_state = self.chunks.iter().filter(|(_, chunk)| chunk.state == state);
        of_state.map(|(first, _)| first).collect()
    }

    /// The size of the chunk that begins at this page, in bytes.
    pub(crate) fn chunk_bytes(&self, first: usize) -> usize {
        self.chunks
            .get(first)
            .map_or(0, |chunk| chunk.pages() * self.page_bytes)
    }

    pub(crate) fn state_of(&self, first: usize) -> Option<ChunkState> {
        self.chunks.get(first).map(|chunk| chunk.state)
    }

    fn pages_of(&self, bytes: &Range<usize>) -> Range<usize> {
        // A page is a power of two bytes.
        let shift = self.page_bytes.trailing_zeros();
        let end = (bytes.end + self.page_bytes - 1) >> shift;
        bytes.start >> shift..end
    }

    fn bytes_of(&self, pages: &Range<usize>) -> Range<usize> {
        pages.start * self.page_bytes..pages.end * self.page_bytes
    }

    /// The chunks that back some of these pages, in order.
    fn chunks_of(&self, pages: Range<usize>) -> impl Iterator<Item = (usize, &Chunk<M>)> {
        let from = self.place_at_or_after(pages.start);
        self.chunks.visit(from, pages.end)
    }

    /// Where the chunk is that backs `page`, or else the next one after it.
    fn place_at_or_after(&self, page: usize) -> Option<Position> {
        let before = self.chunks.at_or_before(page);
        let backs = |place: &Position| {
            let (first, chunk) = self.chunks.entry(*place);
            first + chunk.pages() > page
        };
        before.filter(backs).or_else(|| self.chunks.next(before))
    }

    /// Whether an allocation is under way.
    pub(crate) fn is_any_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// The lowest offset, a multiple of `alignment`, at which `bytes` bytes are unused below
    /// `capacity`, and not in a shared chunk; or else the length of the largest such run.
    pub(crate) fn place(
        &self,
        bytes: usize,
        alignment: usize,
        capacity: usize,
    ) -> Result<usize, usize> {
        let mut largest = 0;
        let unused = self.live.gaps(0..capacity);
        let unused = unused.flat_map(|gap| self.pending.gaps(gap));
        for gap in unused.flat_map(|gap| self.outside_shared(gap)) {
            let start = gap.start.next_multiple_of(alignment);
            if start < gap.end && gap.end - start >= bytes {
                return Ok(start);
            }
            largest = largest.max(gap.len());
        }
        Err(largest)
    }

    /// What an allocation of these bytes would find, or `None` if some are taken.
    pub(crate) fn survey(&self, bytes: &Range<usize>) -> Option<Survey> {
        if self.is_taken(bytes) {
            return None;
        }
        let pages = self.pages_of(bytes);
        let mut survey = Survey::default();
        let mut at = pages.start;
        for (first, chunk) in self.chunks_of(pages.clone()) {
            if at < first {
                survey.missing.push(at..first);
            }
            at = first + chunk.pages();
            match chunk.state {
                ChunkState::Backed => survey.shared |= chunk.shared,
                ChunkState::Parked | ChunkState::Retiring if chunk.shared => {
                    survey.leaving.push(first);
                }
                ChunkState::Parked => survey.parked.push(first),
                ChunkState::Retiring => survey.retiring.push(first),
                ChunkState::Filling
                | ChunkState::Draining
                | ChunkState::Relocating
                | ChunkState::Restoring => {
                    survey.busy = true;
                }
                ChunkState::Quarantined | ChunkState::Stranded => survey.quarantined = true,
            }
        }
        if at < pages.end {
            survey.missing.push(at..pages.end);
        }
        Some(survey)
    }

    /// The bytes of the extent that ends at an offset, as far as they are the range's own: what it
    /// shares is no reason to take much more. 0 if no extent ends there.
    pub(crate) fn extent_bytes(&self, end: usize) -> usize {
        let bytes = self.live.length_before(end);
        match self.any_shared() {
            false => bytes,
            true => bytes.min(end.saturating_sub(self.shared_end * self.page_bytes)),
        }
    }

    /// The first page at or after `page` that a chunk backs, or `end`.
    pub(crate) fn next_chunk(&self, page: usize, end: usize) -> usize {
        let next = self.chunks.range(page..end).next();
        next.map_or(end, |(first, _)| first)
    }

    /// Takes bytes if they lie in one chunk that is backed or parked, and are not live. Not in a
    /// shared chunk: others read it. Returns whether it did. The short way for what a cache does
    /// most: few look-ups, no allocation.
    #[inline]
    pub(crate) fn take_within_chunk(&mut self, bytes: &Range<usize>) -> bool {
        if !self.pending.is_empty() {
            return false;
        }
        let pages = self.pages_of(bytes);
        let Some(place) = self.chunks.at_or_before(pages.start) else {
            return false;
        };
        // Also if it is not taken here: the longer way begins with the same chunk.
        self.chunks.note(place);
        let (first, chunk) = self.chunks.entry(place);
        let is_there = matches!(chunk.state, ChunkState::Backed | ChunkState::Parked);
        if !is_there || chunk.shared || first + chunk.pages() < pages.end {
            return false;
        }
        let Some(around) = self.live.around(bytes) else {
            return false;
        };
        let fresh = around.fresh_pages(&pages, self.page_bytes).len();
        let chunk = self.chunks.value_mut(place);
        if chunk.state == ChunkState::Parked {
            self.counts.change(first, chunk, ChunkState::Backed);
        }
        chunk.live_pages += fresh as u32;
        chunk.taken();
        self.live_pages += fresh;
        self.live.insert_between(bytes.clone(), &around);
        true
    }

    /// Whether these bytes lie in one chunk that is backed, so that others have bytes in it.
    pub(crate) fn is_within_backed(&self, bytes: &Range<usize>) -> bool {
        let pages = self.pages_of(bytes);
        let place = self.chunks.at_or_before(pages.start);
        place.is_some_and(|place| {
            let (first, chunk) = self.chunks.entry(place);
            chunk.state == ChunkState::Backed && first + chunk.pages() >= pages.end
        })
    }

    /// Whether a chunk backs the first of the pages of these bytes, and not all of them.
    pub(crate) fn is_beyond_chunk(&self, bytes: &Range<usize>) -> bool {
        let pages = self.pages_of(bytes);
        let place = self.chunks.at_or_before(pages.start);
        place.is_some_and(|place| {
            let (first, chunk) = self.chunks.entry(place);
            let end = first + chunk.pages();
            end > pages.start && end < pages.end
        })
    }

    /// Takes bytes for which no page is missing.
    pub(crate) fn take(&mut self, bytes: &Range<usize>, survey: &Survey) {
        for first in survey.parked.iter().chain(&survey.retiring) {
            self.set_state(*first, ChunkState::Backed);
        }
        self.make_live(bytes);
    }

    /// Takes the bytes, marks the runs of pages that are to be made, which hold the missing ones,
    /// as being filled and the parked and retiring ones as backed.
    pub(crate) fn begin(
        &mut self,
        bytes: &Range<usize>,
        survey: &Survey,
        runs: impl IntoIterator<Item = Range<usize>>,
    ) {
        self.pending.insert(bytes.clone());
        for run in runs {
            self.insert(run, ChunkState::Filling, None);
        }
        for first in &survey.parked {
            self.set_state(*first, ChunkState::Backed);
            if let Some(chunk) = self.chunks.get_mut(*first) {
                chunk.untouched = true;
            }
        }
        for first in &survey.retiring {
            self.set_state(*first, ChunkState::Backed);
        }
    }

    /// Ends a filling that worked: its chunks lie in its runs and cover all the pages that were
    /// missing. So one begins where a run does, and takes its place.
    pub(crate) fn finish(
        &mut self,
        bytes: &Range<usize>,
        chunks: impl IntoIterator<Item = (Range<usize>, M)>,
    ) {
        for (pages, memory) in chunks {
            self.insert(pages, ChunkState::Backed, Some(memory));
        }
        self.pending.remove(bytes);
        self.make_live(bytes);
    }

    /// Bytes whose pages are all backed become live.
    fn make_live(&mut self, bytes: &Range<usize>) {
        let touched = self.pages_of(bytes);
        let fresh = self.lone_pages(bytes);
        self.live_pages += fresh.len();
        let from = self.place_at_or_after(touched.start);
        self.chunks.visit_mut(from, touched.end, |first, chunk| {
            chunk.taken();
            chunk.live_pages += common_pages(&fresh, first, chunk);
        });
        self.live.insert(bytes.clone());
    }

    /// Ends a filling that failed: everything is as before, except chunks that could not be undone.
    /// Returns the chunks that are unused now, because they were retiring before or a neighbour
    /// freed its bytes meanwhile; they are now retiring.
    pub(crate) fn abort(
        &mut self,
        bytes: &Range<usize>,
        survey: &Survey,
        runs: impl IntoIterator<Item = Range<usize>>,
        stuck: impl IntoIterator<Item = (Range<usize>, M)>,
    ) -> Vec<usize> {
        self.pending.remove(bytes);
        for run in runs {
            self.remove(run.start);
        }
        for (pages, memory) in stuck {
            self.insert(pages, ChunkState::Quarantined, Some(memory));
        }
        for first in &survey.parked {
            // What a neighbour used meanwhile retires instead, behind a fence of its own.
            if self.chunks.get(*first).is_some_and(|chunk| chunk.untouched)
                && self.is_unused(*first)
            {
                self.set_state(*first, ChunkState::Parked);
            }
        }
        let mut unused = Vec::new();
        self.retire_unused(bytes, &(0..0), &mut unused);
        unused
    }

    /// Ends the life of live bytes. Adds the chunks that are unused now to `unused`; they are
    /// retiring.
    pub(crate) fn release(&mut self, bytes: &Range<usize>, unused: &mut Vec<usize>) {
        self.live.remove(bytes);
        let ended = self.lone_pages(bytes);
        self.live_pages = self.live_pages.saturating_sub(ended.len());
        self.retire_unused(bytes, &ended, unused);
    }

    /// Takes pages of these bytes from the counts of live ones, and has the chunks retire that are
    /// unused now.
    fn retire_unused(
        &mut self,
        bytes: &Range<usize>,
        ended: &Range<usize>,
        unused: &mut Vec<usize>,
    ) {
        let pages = self.pages_of(bytes);
        let from = self.place_at_or_after(pages.start);
        let (page_bytes, counts) = (self.page_bytes, &mut self.counts);
        let shared_live_pages = &mut self.shared_live_pages;
        let pending = (!self.pending.is_empty()).then_some(&self.pending);
        self.chunks.visit_mut(from, pages.end, |first, chunk| {
            let ended_pages = common_pages(ended, first, chunk);
            chunk.live_pages = chunk.live_pages.saturating_sub(ended_pages);
            if chunk.shared {
                *shared_live_pages -= ended_pages as usize;
            }
            if chunk.state != ChunkState::Backed || chunk.live_pages > 0 {
                return;
            }
            let end = first + chunk.pages();
            let bytes = first * page_bytes..end * page_bytes;
            debug_assert!(!self.live.overlaps(&bytes));
            if pending.is_none_or(|pending| !pending.overlaps(&bytes)) {
                counts.change(first, chunk, ChunkState::Retiring);
                unused.push(first);
            }
        });
    }

    /// Whether a chunk is backed, has no live byte, and is about to get none.
    fn is_unused(&self, first: usize) -> bool {
        self.chunks.get(first).is_some_and(|chunk| {
            chunk.state == ChunkState::Backed
                && !self.is_taken(&self.bytes_of(&(first..first + chunk.pages())))
        })
    }

    /// Whether any of the bytes are live or about to be.
    fn is_taken(&self, bytes: &Range<usize>) -> bool {
        self.live.overlaps(bytes) || self.pending.overlaps(bytes)
    }

    /// The device has finished with a retiring chunk.
    pub(crate) fn park(&mut self, first: usize) {
        if self.state_of(first) == Some(ChunkState::Retiring) {
            self.set_state(first, ChunkState::Parked);
        }
    }

    /// Those of the pages of these bytes, which are not in `live`, that no neighbour keeps live.
    fn lone_pages(&self, bytes: &Range<usize>) -> Range<usize> {
        let mut pages = self.pages_of(bytes);
        let whole = self.bytes_of(&pages);
        if whole.start < bytes.start && self.live.overlaps(&(whole.start..bytes.start)) {
            pages.start += 1;
        }
        if bytes.end < whole.end && !pages.is_empty() && self.live.overlaps(&(bytes.end..whole.end))
        {
            pages.end -= 1;
        }
        pages
    }

    fn insert(&mut self, pages: Range<usize>, state: ChunkState, memory: Option<M>) {
        let chunk = Chunk {
            // A run of 2^32 pages of 64 KiB is more than an address space holds.
            pages: u32::try_from(pages.len()).unwrap_or(u32::MAX),
            live_pages: 0,
            state,
            untouched: false,
            contents: Contents::Unknown,
            ahead: false,
            shared: false,
            memory,
        };
        self.counts.add(&chunk);
        if let Some(before) = self.chunks.insert(pages.start, chunk) {
            debug_assert_eq!(before.state, ChunkState::Filling, "two at {pages:?}");
            self.counts.remove(pages.start, &before);
        }
    }

    fn remove(&mut self, first: usize) {
        if let Some(chunk) = self.chunks.remove(first) {
            self.counts.remove(first, &chunk);
            debug_assert_eq!(chunk.live_pages, 0);
        }
    }

    fn set_state(&mut self, first: usize, state: ChunkState) {
        if let Some(chunk) = self.chunks.get_mut(first) {
            self.counts.change(first, chunk, state);
        }
        if self.counts.is_overgrown() {
            let chunks = &self.chunks;
            self.counts
                .tidy(|first| chunks.get(first).is_some_and(Chunk::is_parked));
        }
    }
}

/// How many of some pages a chunk backs that begins at `first`.
fn common_pages<M>(pages: &Range<usize>, first: usize, chunk: &Chunk<M>) -> u32 {
    let end = pages.end.min(first + chunk.pages());
    // No more than the chunk has.
    end.saturating_sub(pages.start.max(first)) as u32
}

impl Around {
    /// The pages of a range that no neighbour keeps live.
    fn fresh_pages(&self, pages: &Range<usize>, page_bytes: usize) -> Range<usize> {
        let mut fresh = pages.clone();
        let before = self.before.as_ref();
        if before.is_some_and(|before| before.end > fresh.start * page_bytes) {
            fresh.start += 1;
        }
        let after = self.after.as_ref();
        if !fresh.is_empty() && after.is_some_and(|after| after.start < fresh.end * page_bytes) {
            fresh.end -= 1;
        }
        fresh
    }
}

#[cfg(test)]
mod tests;
