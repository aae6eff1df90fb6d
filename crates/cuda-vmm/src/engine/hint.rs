//! What the owner of a range says of its next allocations.

use super::books::hint::Hint;
use super::handle::RangeHandle;
use crate::Result;
use crate::sync::Arc;

impl RangeHandle {
    /// Sets which pages allocations will need next, so that the worker makes those ahead; returns
    /// whether it has something to do.
    pub(crate) fn expect(&self, hint: Arc<Hint>) -> Result<bool> {
        Ok(self.slot.lock_open()?.expect(hint))
    }

    /// Wakes the worker.
    pub(crate) fn wake_worker(&self) {
        let engine = self.inner();
        engine.worker.wake(engine, false);
    }
}
