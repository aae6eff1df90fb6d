//! Ending the life of bytes.

use super::at_work::AtWork;
use super::handle::RangeHandle;
use super::range::Range;
use super::range::leases::Asker;
use super::retire::Freed;
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
        let freed = self.end(parts)?;
        self.inner().record(freed);
        Ok(())
    }

    /// As [`deallocate`](Self::deallocate), but the caller records behind which fences the chunks
    /// retire that are unused now.
    fn end(&self, parts: &[(usize, usize)]) -> Result<Option<Freed>> {
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
        if waits {
            engine.worker.wake(engine, false);
        }
        Ok(users.map(|users| Freed::new(slot, users, unused)))
    }
}

/// Ends the life of bytes of several ranges of one engine, each by its own parts. Their chunks
/// retire behind the same fences if the same streams use them. Calls `failed` for each range of
/// which none is freed.
pub(crate) fn deallocate_together<'a>(
    ranges: impl IntoIterator<Item = (&'a RangeHandle, Vec<(usize, usize)>)>,
    mut failed: impl FnMut(VmmError),
) {
    let (mut engine, mut all, mut work) = (None, Vec::new(), None);
    for (range, parts) in ranges {
        match range.end(&parts) {
            Ok(freed) => all.extend(freed),
            Err(error) => failed(error),
        }
        // From now on chunks may be in this thread's hands, while tokens of the next range are
        // asked.
        work.get_or_insert_with(AtWork::begin);
        engine = Some(range.inner());
    }
    if let Some(engine) = engine {
        engine.record(all);
    }
}
