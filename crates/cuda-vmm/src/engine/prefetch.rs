//! Making memory before it is asked for: mapped and accessible beyond the end of a range's latest allocation.

use super::books::policy::{chunk_pages, grown_end};
use super::fill::Target;
use super::range::Range;
use super::{AtWork, Drained, Inner, RangeId, State};
use crate::sync::{Arc, thread};
use core::ops;

/// For how many turns the worker leaves the driver to others between two chunks, some microseconds. The driver's lock is
/// not a fair one: without this a thread that wants it could wait many times over.
const REST_TURNS: usize = if cfg!(model_check) { 1 } else { 20 };

impl Range {
    /// The pages that are to be backed ahead. None where each allocation is to have a handle of its own.
    fn window(&self) -> ops::Range<usize> {
        let start = self.frontier_bytes.div_ceil(self.page_bytes);
        let end = self.capacity_bytes.div_ceil(self.page_bytes);
        let pages = match self.options.single_handle {
            true => 0,
            false => self.options.ahead_bytes_max / self.page_bytes,
        };
        start..(start + pages).min(end)
    }

    /// A chunk made ahead of where allocations go no longer: nowhere, if the range is closed. While nothing is wanted where
    /// they go now, it stays: who takes back what was freed at one place comes again to where his memory ends.
    pub(super) fn stale_ahead(&self) -> Option<usize> {
        if self.attended {
            return None;
        }
        if self.closed {
            return self.pages.ahead().next();
        }
        match self.is_hungry {
            true => self.pages.ahead_outside(&self.window()),
            false => None,
        }
    }

    /// Notes where the latest allocation ended; says whether that gives the worker something to do.
    pub(super) fn advance(&mut self, end_bytes: usize) -> bool {
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
    fn next_ahead(&self, chunk_bytes_max: usize) -> Option<ops::Range<usize>> {
        let window = self.window();
        let first = self.pages.first_missing(window.clone())?;
        let extent_bytes = self.pages.live().length_before(self.frontier_bytes);
        let extent_pages = extent_bytes.div_ceil(self.page_bytes) + first - window.start;
        let largest = chunk_pages(extent_pages, self.page_bytes, chunk_bytes_max);
        let end = self.pages.next_chunk(first, window.end);
        Some(first..grown_end(&(first..first + 1), largest, end))
    }
}

impl State {
    /// Takes out a chunk made ahead, of one range or of all, to be unmapped.
    pub(super) fn take_ahead(
        &self,
        only: Option<RangeId>,
        pick: impl Fn(&Range) -> Option<usize>,
    ) -> Option<Drained> {
        let mut ranges = self.ranges.iter();
        ranges.find_map(|(id, mut range)| {
            let first = pick(&range).filter(|_| only.is_none_or(|only| only == id))?;
            range.drain(id, first)
        })
    }
}

impl Inner {
    /// Makes what is to be there ahead, a chunk at a time; returns the bytes made. The worker's thread rests in between.
    pub(super) fn prefetch(self: &Arc<Self>, is_worker: bool) -> usize {
        let mut made_bytes = 0;
        while let Some(bytes) = self.prefetch_one() {
            made_bytes += bytes;
            if is_worker && bytes > 0 {
                (0..REST_TURNS).for_each(|_| thread::yield_now());
            }
        }
        made_bytes
    }

    /// Looks after one range that wants memory ahead; `None` if none does.
    fn prefetch_one(self: &Arc<Self>) -> Option<usize> {
        let mut state = self.lock();
        let mut ranges = state.ranges.iter();
        let (id, mut range) = ranges.find(|(_, range)| range.is_hungry && !range.closed)?;
        drop(ranges);
        let run = match range.owes() {
            // What it is asked to give back is not made anew.
            true => None,
            false => range.next_ahead(self.options.chunk_bytes_max),
        };
        let (Some(run), Some(target)) = (run, Target::of(&range)) else {
            range.quietly().is_hungry = false;
            return Some(0);
        };
        let (account, bytes) = (range.account, run.len() * range.page_bytes);
        // Nobody else makes pages of it, which takes the engine's lock.
        drop(range);
        let Ok(mut supply) = state.charge_chunks(account, &[bytes], None) else {
            // Nothing is given up for what nobody has asked for.
            state.stop_prefetching(id);
            drop(state);
            crate::events::debug!(bytes, "the budget has no room for memory made ahead");
            return Some(0);
        };
        if let Some(mut range) = state.ranges.get(id) {
            range.quietly().pages.begin_ahead(run.clone());
        }
        let work = AtWork::begin();
        drop(state);
        let give_way = || self.device.give_way();
        let made = self.make(&target, &run, &mut supply, give_way);
        let mut state = self.lock();
        let (chunk, failure) = match made {
            Ok(made) => (Some((made.pages, made.mapping)), None),
            Err(mut failure) => (failure.still_mapped.pop(), Some(failure)),
        };
        let made_bytes = if failure.is_none() { bytes } else { 0 };
        let mut refused = None;
        let kept_bytes = chunk.as_ref().map_or(0, |_| bytes);
        // The range cannot have gone: it ends with its last chunk, and one is being filled.
        let mut is_left = false;
        if let Some(mut range) = state.ranges.get(id) {
            range
                .pages
                .finish_ahead(run.start, chunk, failure.is_none());
            is_left = range.closed && !range.attended;
        }
        if let Some(mut failure) = failure {
            state.settle(account, bytes, kept_bytes, &mut failure, supply);
            state.stop_prefetching(id);
            refused = Some(failure.error);
        }
        drop((work, state));
        if is_left {
            self.go_on_closing();
        }
        if let Some(error) = refused {
            crate::events::debug!(%error, bytes, "memory could not be made ahead");
        }
        Some(made_bytes)
    }
}

impl State {
    fn stop_prefetching(&self, id: RangeId) {
        if let Some(mut range) = self.ranges.get(id) {
            range.quietly().is_hungry = false;
        }
    }
}
