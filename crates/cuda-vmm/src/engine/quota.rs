//! What a range may hold, and what it is asked to give back.

use super::books::ledger::Quota;
use super::handle::RangeHandle;
use super::owed::Owed;
use crate::sync::Arc;
use crate::{Result, VmmError};

impl RangeHandle {
    /// What the range owes.
    pub(crate) fn owed(&self) -> Result<Arc<Owed>> {
        let range = self.slot.lock_open()?;
        Ok(range.owed.clone())
    }

    /// Gives back to the driver what the range holds and does not use; returns the bytes. Waits for
    /// nothing.
    pub(crate) fn give_back(&self) -> Result<usize> {
        drop(self.slot.lock_open()?);
        let engine = self.inner();
        engine.poll();
        let (bytes, outcome) = engine.give_up(Some(self.id()), |_| false);
        // Also if nothing went: what is owed is worked out anew.
        engine.state.lock().note_change();
        outcome.map(|()| bytes)
    }

    /// What the range may hold.
    pub(crate) fn quota(&self) -> Result<Quota> {
        let account = self.slot.lock_open()?.account;
        let state = self.inner().state.lock();
        state.ledger.quota(account).ok_or(VmmError::Closed)
    }

    /// Changes what the range may hold.
    pub(crate) fn set_quota(&self, quota: Quota) -> Result<()> {
        let engine = self.inner();
        let account = self.slot.lock_open()?.account;
        engine.make_room_for(|ledger| ledger.set_quota(account, quota))?;
        // What it has to spare above its ceiling goes with the next step.
        engine.worker.wake(engine, false);
        Ok(())
    }
}
