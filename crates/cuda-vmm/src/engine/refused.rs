//! Memory that the driver refused to take back: kept on its account, tried again with growing
//! delays, and reported once.
//!
//! The first refusal since nothing was refused gives one warning. The worker hears of each refusal,
//! and tries again when the back-off says so. It tries one piece after the other until the driver
//! refuses one. So a driver that refuses all gets one call each time, however much there is. Each
//! such try begins with another piece. When nothing is left, there is one message more.
//!
//! Calls that need the memory try at once: about the pages in their way, or until the driver
//! refuses a piece. In a context that is beyond use no call tries:
//! [`Device::is_lost`](crate::Device::is_lost) says so.

use super::books::owner::Owner;
use super::changes::Locked;
use super::inner::Inner;
use crate::sync::{self, Arc};
use crate::{PhysicalMemory, Result, VmmError};

impl Inner {
    /// Releases the lock, after memory was given back or the driver has refused to take it. Warns
    /// of the first refusal, and wakes the worker for each.
    pub(crate) fn note_refusal(
        self: &Arc<Self>,
        mut state: Locked<'_>,
        refusal: Option<&VmmError>,
        bytes: usize,
    ) {
        let is_first = refusal.is_some() && !state.refusals.is_told();
        if is_first {
            state.refusals.tell(sync::now());
        }
        drop(state);
        let Some(error) = refusal else {
            return;
        };
        if !is_first {
            crate::events::debug!(%error, bytes, "the driver did not take memory back");
        } else if error.is_poisoned() {
            crate::events::warn!(%error, bytes, "the context is beyond use; its memory is left alone");
        } else {
            crate::events::warn!(%error, bytes, "the driver did not take memory back, which is quarantined and tried again");
        }
        // Each time: it may have looked while this thread had the last of it in hand, and found
        // nothing to try again.
        self.worker.wake(self, false);
    }

    /// Releases memory that is mapped nowhere, and that `releasing` names. What the driver refuses
    /// is tried again later.
    pub(crate) fn release(
        self: &Arc<Self>,
        owner: Option<Owner>,
        memory: PhysicalMemory,
    ) -> Result<usize> {
        let bytes = memory.bytes();
        let outcome = memory.close();
        let mut state = self.state.lock();
        state.end_releasing(owner, bytes);
        let outcome = match (outcome, owner) {
            (Ok(()), Some(owner)) => {
                state.ledger.refund(owner.account, bytes);
                Ok(bytes)
            }
            (Ok(()), None) => {
                state.ledger.take_from_cache(bytes);
                Ok(bytes)
            }
            (Err(failure), _) => {
                state.unreleased.push((owner, failure.object));
                Err(failure.error)
            }
        };
        self.note_refusal(state, outcome.as_ref().err(), bytes);
        outcome
    }
}
