//! Where memory is made ahead of a range's allocations.

use super::Range;
use crate::engine::books::policy::{chunk_pages, grown_end};
use core::ops;

impl Range {
    /// The pages that are to be backed ahead. None if each allocation is to have a handle of its
    /// own.
    fn window(&self) -> ops::Range<usize> {
        let start = self.frontier_bytes.div_ceil(self.page_bytes);
        let end = self.capacity_bytes.div_ceil(self.page_bytes);
        let pages = match self.options.single_handle {
            true => 0,
            false => self.options.ahead_bytes_max / self.page_bytes,
        };
        start..(start + pages).min(end)
    }

    /// Whether the worker has memory to make ahead for it now.
    pub(crate) fn wants_ahead(&self) -> bool {
        self.is_hungry && !self.takes_no_more()
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
        match self.is_hungry {
            true => self.pages.ahead_outside(&self.window()),
            false => None,
        }
    }

    /// Notes where the latest allocation ended; returns whether that gives the worker something to
    /// do.
    pub(crate) fn advance(&mut self, end_bytes: usize) -> bool {
        if self.options.ahead_bytes_max == 0 {
            return false;
        }
        self.frontier_bytes = end_bytes;
        let window = self.window();
        // Only when so little is left, so that the worker is not woken for every page.
        let low_pages = match self.options.ahead_bytes_min {
            None => window.len().div_ceil(2),
            Some(bytes) => bytes
                .div_ceil(self.page_bytes)
                .clamp(1, window.len().max(1)),
        };
        let low = window.start..window.end.min(window.start + low_pages);
        self.is_hungry |= self.pages.first_missing(low).is_some();
        self.is_hungry
    }

    /// The next pages to make ahead, as one chunk.
    pub(crate) fn next_ahead(&self, chunk_bytes_max: usize) -> Option<ops::Range<usize>> {
        let window = self.window();
        let first = self.pages.first_missing(window.clone())?;
        let extent_bytes = self.pages.live().length_before(self.frontier_bytes);
        let extent_pages = extent_bytes.div_ceil(self.page_bytes) + first - window.start;
        let chunk_bytes_max = self.chunk_bytes_max(chunk_bytes_max);
        let largest = chunk_pages(extent_pages, self.page_bytes, chunk_bytes_max);
        let end = self.pages.next_chunk(first, window.end);
        Some(first..grown_end(&(first..first + 1), largest, end))
    }
}
