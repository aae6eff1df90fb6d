//! Keeping memory mapped for graphs that name it.

use super::range::Range;
use super::{Inner, RangeId};
use crate::sync::Arc;
use crate::{Result, VmmError};
use core::ops;
use std::collections::BTreeSet;

/// Keeps the memory behind a range of addresses mapped while it lives; made by
/// [`VirtualMemoryPool::pin_for_graph`](crate::VirtualMemoryPool::pin_for_graph).
///
/// Dropping it lets the memory go, as far as it is not live and the device has finished with it.
#[derive(Debug)]
pub struct GraphPin {
    engine: Arc<Inner>,
    range: RangeId,
    number: u64,
}

impl Range {
    fn is_pinned(&self, pages: &ops::Range<usize>) -> bool {
        let mut pins = self.pins.values();
        pins.any(|pin| pin.start < pages.end && pages.start < pin.end)
    }

    /// Whether a pin keeps the chunk that begins at this page from being unmapped.
    pub(super) fn is_chunk_pinned(&self, first: usize) -> bool {
        let pages = self.pages.chunk_bytes(first) / self.page_bytes;
        self.is_pinned(&(first..first + pages))
    }

    /// Whether a pin or a lease keeps the chunk that begins at this page from being moved.
    pub(super) fn is_chunk_held(&self, first: usize) -> bool {
        let pages = self.pages.chunk_bytes(first) / self.page_bytes;
        let pages = first..first + pages;
        self.is_pinned(&pages) || self.is_leased(&pages)
    }

    /// A parked chunk that may be unmapped.
    pub(super) fn spare_parked(&mut self) -> Option<usize> {
        if self.pins.is_empty() {
            return self.pages.first_parked();
        }
        let mut parked = self.pages.parked();
        parked.find(|first| !self.is_chunk_pinned(*first))
    }

    /// What is parked and may be unmapped, in bytes.
    pub(super) fn spare_parked_bytes(&self) -> usize {
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
    pub(super) fn is_ending(&self) -> bool {
        self.closed && self.pins.is_empty() && !self.waits_for_leases()
    }
}

impl Inner {
    /// Pins live bytes.
    pub(crate) fn pin(
        self: &Arc<Self>,
        id: RangeId,
        offset: usize,
        bytes: usize,
    ) -> Result<GraphPin> {
        self.check_process()?;
        let mut state = self.lock();
        // A pin that comes serves nobody.
        let state = state.quietly();
        let number = state.next_pin;
        state.next_pin += 1;
        let mut range = match state.ranges.get(id) {
            Some(range) if !range.closed => range,
            _ => return Err(VmmError::Closed),
        };
        let extent = range.live_extent(offset, bytes)?;
        let pages = extent.pages(range.page_bytes);
        range.quietly().pins.insert(number, pages);
        Ok(GraphPin {
            engine: self.clone(),
            range: id,
            number,
        })
    }
}

impl Drop for GraphPin {
    fn drop(&mut self) {
        if self.engine.check_process().is_err() {
            return;
        }
        let state = self.engine.lock();
        let Some(mut range) = state.ranges.get(self.range) else {
            return;
        };
        range.pins.remove(&self.number);
        let ends = range.is_ending();
        // What it kept mapped may serve a thread that waits, which is told here.
        drop(range);
        drop(state);
        if ends {
            // Its pool is gone, and waited for nothing but this.
            self.engine.go_on_closing();
        }
        self.engine.worker.wake(&self.engine, false);
    }
}
