//! Keeping memory mapped for graphs that name it.

use super::handle::RangeHandle;
use super::state::State;
use crate::{Result, VmmError};

/// Keeps the memory behind a range of addresses mapped while it lives; made by
/// [`VirtualMemoryPool::pin_for_graph`](crate::VirtualMemoryPool::pin_for_graph).
///
/// Dropping it lets the memory go, as far as it is not live and the device has finished with it.
#[derive(Debug)]
pub struct GraphPin {
    range: RangeHandle,
    number: u64,
}

impl RangeHandle {
    /// Pins live bytes.
    pub(crate) fn pin(&self, offset: usize, bytes: usize) -> Result<GraphPin> {
        let mut state = self.engine().open()?.state.lock();
        // A new pin frees nothing, so it wakes no thread.
        let state = state.quietly();
        let number = state.next_pin;
        state.next_pin += 1;
        let mut range = match state.ranges.get(self.id()) {
            Some(range) if !range.closed => range,
            _ => return Err(VmmError::Closed),
        };
        let extent = range.live_extent(offset, bytes)?;
        let pages = extent.pages(range.page_bytes);
        range.quietly().pins.insert(number, pages);
        Ok(GraphPin {
            range: self.clone(),
            number,
        })
    }
}

impl Drop for GraphPin {
    fn drop(&mut self) {
        let Ok(engine) = self.range.engine().open() else {
            return;
        };
        let mut state = engine.state.lock();
        let State { ranges, shared, .. } = state.quietly();
        let id = self.range.id();
        let Some(mut range) = ranges.get(id) else {
            return;
        };
        if let Some(pages) = range.pins.remove(&self.number) {
            let unused = range.unused_shared(&pages);
            unused.for_each(|first| shared.retire((id, first)));
        }
        let ends = range.is_ending();
        // What it kept mapped may serve a thread that waits, which is told here.
        drop(range);
        drop(state);
        if ends {
            // Its pool is gone, and waited for nothing but this.
            engine.go_on_closing();
        }
        engine.worker.wake(engine, false);
    }
}
