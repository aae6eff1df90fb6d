//! Where memory is made ahead of a range's allocations.

use super::Range;
use crate::engine::books::hint::Hint;
use crate::engine::books::policy::{chunk_pages, grown_end};
use crate::sync::Arc;
use core::ops;

impl Range {
    /// How many pages are backed ahead at most. None if each allocation is to have a handle of its
    /// own.
    fn ahead_pages(&self) -> usize {
        match self.options.single_handle {
            true => 0,
            false => self.options.ahead_bytes_max / self.page_bytes,
        }
    }

    /// The pages behind the latest allocation that are to be backed ahead, if no hint names others.
    fn window(&self) -> ops::Range<usize> {
        let start = self.frontier_bytes.div_ceil(self.page_bytes);
        let end = self.capacity_bytes.div_ceil(self.page_bytes);
        start..(start + self.ahead_pages()).min(end)
    }

    /// How many pages are wanted.
    fn wanted_pages(&self) -> usize {
        match &self.hint {
            Some(hint) => hint.len().min(self.ahead_pages()),
            None => self.window().len(),
        }
    }

    /// The pages that are wanted, in the order of the allocations that will need them; at most this
    /// many, which is not more than there are.
    fn wanted(&self, pages: usize) -> impl Iterator<Item = ops::Range<usize>> + '_ {
        let hinted = self.hint.iter().flat_map(move |hint| hint.first(pages));
        let start = self.window().start;
        let behind = self.hint.is_none().then_some(start..start + pages);
        hinted.chain(behind)
    }

    /// Whether the worker has memory to make ahead for it now.
    pub(crate) fn wants_ahead(&self) -> bool {
        self.is_hungry && !self.takes_no_more() && self.rest.is_awake()
    }

    /// A chunk made ahead at a place that allocations have left; any, if the range is closed. While
    /// no memory is wanted ahead at their new place, it stays: allocations that fill what was freed
    /// come back to the old end.
    pub(crate) fn stale_ahead(&self) -> Option<usize> {
        if self.has_closer {
            return None;
        }
        if self.takes_no_more() {
            return self.pages.ahead().next();
        }
        if !self.is_hungry {
            return None;
        }
        match &self.hint {
            Some(hint) => {
                let mut ahead = self.pages.ahead();
                ahead.find(|first| !hint.overlaps(&self.pages.chunk_at(*first)))
            }
            None => self.pages.ahead_outside(&self.window()),
        }
    }

    /// Notes where the latest allocation ended; returns whether that gives the worker something to
    /// do.
    pub(crate) fn advance(&mut self, end_bytes: usize) -> bool {
        if self.options.ahead_bytes_max == 0 {
            return false;
        }
        self.frontier_bytes = end_bytes;
        self.look_ahead()
    }

    /// Sets which pages allocations will need next, instead of those behind the latest one; returns
    /// whether that gives the worker something to do.
    pub(crate) fn expect(&mut self, hint: Arc<Hint>) -> bool {
        self.hint = Some(hint);
        self.look_ahead()
    }

    /// Looks whether memory is wanted ahead; returns whether the worker has any to make.
    pub(crate) fn look_ahead(&mut self) -> bool {
        self.is_hungry |= self.is_low();
        self.is_hungry
    }

    /// Whether one of the pages that are wanted first is missing. Not any of them, so that the
    /// worker is not woken for every page.
    fn is_low(&self) -> bool {
        let pages = self.wanted_pages();
        let low_pages = match self.options.ahead_bytes_min {
            None => pages.div_ceil(2),
            Some(bytes) => bytes.div_ceil(self.page_bytes).max(1).min(pages),
        };
        let mut low = self.wanted(low_pages);
        low.any(|run| self.pages.first_missing(run).is_some())
    }

    /// The next pages to make ahead, as one chunk.
    pub(crate) fn next_ahead(&self, chunk_bytes_max: usize) -> Option<ops::Range<usize>> {
        let missing = |run: ops::Range<usize>| Some((self.pages.first_missing(run.clone())?, run));
        let (first, run) = self.wanted(self.wanted_pages()).find_map(missing)?;
        let end_bytes = match self.hint {
            Some(_) => run.start * self.page_bytes,
            None => self.frontier_bytes,
        };
        let extent_bytes = self.pages.extent_bytes(end_bytes);
        let extent_pages = extent_bytes.div_ceil(self.page_bytes) + first - run.start;
        let chunk_bytes_max = self.chunk_bytes_max(chunk_bytes_max);
        let largest = chunk_pages(extent_pages, self.page_bytes, chunk_bytes_max);
        let end = self.pages.next_chunk(first, run.end);
        Some(first..grown_end(&(first..first + 1), largest, end))
    }
}
