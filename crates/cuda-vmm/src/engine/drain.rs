//! Giving memory back to the driver, and trying again what it refused.

use super::pages::ChunkState;
use super::{Inner, RangeId};
use crate::sync::Arc;
use crate::{Mapping, PhysicalMemory, Result};

impl Inner {
    /// Unmaps and releases parked chunks, of one range or of all, until no more than `keep_bytes` are
    /// parked; returns the bytes that went, and the last error if the driver refused some.
    pub(super) fn drain_parked(
        self: &Arc<Self>,
        keep_bytes: usize,
        only: Option<RangeId>,
    ) -> (usize, Result<()>) {
        let mut drained_bytes = 0;
        let mut outcome = Ok(());
        loop {
            let next = {
                let mut state = self.lock();
                let parked = state.parts().parked_bytes;
                if parked <= keep_bytes {
                    break;
                }
                let mut ranges = state
                    .ranges
                    .iter_mut()
                    .filter(|(id, _)| only.is_none_or(|only| **id == only));
                ranges.find_map(|(id, range)| {
                    let first = range.pages.parked().next()?;
                    Some((*id, first, range.pages.drain(first)?))
                })
            };
            let Some((id, first, mapping)) = next else {
                break;
            };
            match self.unmap(id, first, mapping) {
                Ok(bytes) => drained_bytes += bytes,
                Err(error) => outcome = Err(error),
            }
        }
        (drained_bytes, outcome)
    }

    /// Unmaps and releases one draining chunk. What the driver refuses stays charged, in quarantine.
    fn unmap(self: &Arc<Self>, id: RangeId, first: usize, mapping: Mapping) -> Result<usize> {
        let bytes = mapping.bytes();
        let unmapped = mapping.unmap();
        let released = match unmapped {
            Ok(memory) => Ok(Arc::into_inner(memory).map(PhysicalMemory::close)),
            Err(failure) => Err(failure),
        };
        let mut state = self.lock();
        let Some(range) = state.ranges.get_mut(&id) else {
            return Ok(0);
        };
        let account = range.account;
        let outcome = match released {
            Err(failure) => {
                range.pages.quarantine(first, failure.object);
                Err(failure.error)
            }
            Ok(closed) => {
                range.pages.drained(first);
                match closed {
                    Some(Err(failure)) => {
                        state.unreleased.push((account, failure.object));
                        Err(failure.error)
                    }
                    Some(Ok(())) | None => {
                        state.ledger.refund(account, bytes);
                        Ok(bytes)
                    }
                }
            }
        };
        self.unlock_changed(state);
        if outcome.is_err() {
            self.worker.wake(self, false);
        }
        outcome
    }

    /// Tries again what the driver refused; returns the bytes that went.
    pub(super) fn retry(self: &Arc<Self>) -> usize {
        let (unreleased, mapped) = {
            let mut state = self.lock();
            let unreleased = core::mem::take(&mut state.unreleased);
            let releasing = unreleased
                .iter()
                .map(|(account, memory)| (*account, memory.bytes()));
            state.releasing.extend(releasing);
            let mut mapped = Vec::new();
            for (id, range) in &mut state.ranges {
                for first in range.pages.in_state(ChunkState::Quarantined) {
                    mapped.extend(range.pages.drain(first).map(|memory| (*id, first, memory)));
                }
            }
            (unreleased, mapped)
        };
        let mut bytes = 0;
        for (account, memory) in unreleased {
            let freed = memory.bytes();
            let outcome = memory.close();
            let mut state = self.lock();
            let out = state
                .releasing
                .iter()
                .position(|held| *held == (account, freed));
            out.map(|at| state.releasing.swap_remove(at));
            match outcome {
                Ok(()) => {
                    state.ledger.refund(account, freed);
                    bytes += freed;
                }
                Err(failure) => state.unreleased.push((account, failure.object)),
            }
            self.unlock_changed(state);
        }
        for (id, first, mapping) in mapped {
            bytes += self.unmap(id, first, mapping).unwrap_or_default();
        }
        bytes + self.retry_relocations()
    }

    /// Gives up what can be spared, because the device has run out of memory.
    pub(super) fn relieve(self: &Arc<Self>) {
        self.poll();
        self.retry();
        let _ = self.drain_parked(0, None);
    }
}
