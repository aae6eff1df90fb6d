//! Ending the life of bytes.

use super::handle::RangeHandle;
use super::range::Range;
use super::range::leases::Asker;
use crate::{Result, VmmError};

/// A part that begins within one that begins before it, or with it. None is empty, and none too
/// long.
fn overlapping(parts: &[(usize, usize)]) -> Option<(usize, usize)> {
    if parts.len() < 2 {
        return None;
    }
    let mut sorted = parts.to_vec();
    sorted.sort_unstable();
    let pairs = sorted.windows(2);
    let is_within = |pair: &&[(usize, usize)]| pair[1].0 < pair[0].0 + pair[0].1;
    pairs.filter(is_within).map(|pair| pair[1]).next()
}

impl Range {
    /// Checks that these parts can all be freed.
    #[inline]
    fn check_free(&self, parts: &[(usize, usize)]) -> Result<()> {
        for (offset, bytes) in parts.iter().copied() {
            let extent = self.live_extent(offset, bytes)?;
            if self.pages.is_stranded(&extent.range()) {
                return Err(VmmError::Quarantined { offset, bytes });
            }
        }
        match overlapping(parts) {
            // What is freed with another part is not live any more.
            Some((offset, bytes)) => Err(VmmError::NotMapped { offset, bytes }),
            None => Ok(()),
        }
    }
}

impl RangeHandle {
    /// Ends the life of bytes: of each part, given by offset and size, or after an error of none.
    /// Never waits for the device: pages without live bytes retire, all behind the same fences.
    pub(crate) fn deallocate(&self, parts: &[(usize, usize)]) -> Result<()> {
        let (engine, slot) = (self.inner(), &self.slot);
        slot.check_process()?;
        let mut range = slot.lock();
        if !range.leases.is_empty() {
            drop(range);
            slot.ask_tokens(Asker::Passing, Some(parts));
            range = slot.lock();
        }
        if range.closed {
            return Err(VmmError::Closed);
        }
        range.check_free(parts)?;
        range.counters.deallocations += 1;
        let mut unused = Vec::new();
        for (offset, bytes) in parts.iter().copied() {
            range.free(&(offset..offset + bytes), &mut unused);
        }
        if parts.len() > 1 {
            unused.sort_unstable();
        }
        let waits = range.waits_for_leases();
        let users = (!unused.is_empty()).then(|| range.users.clone());
        drop(range);
        if let Some(users) = users {
            engine.record(slot, users, unused);
        }
        if waits {
            engine.worker.wake(engine, false);
        }
        Ok(())
    }
}
