//! Leasing bytes of a range.

use super::handle::RangeHandle;
use super::range::leases::{Asker, LeaseToken};
use crate::Result;
use crate::foreign::Foreign;
use core::ops;

impl RangeHandle {
    /// Leases live bytes until the token is released.
    pub(crate) fn lease(
        &self,
        offset: usize,
        bytes: usize,
        token: Box<dyn LeaseToken>,
    ) -> Result<()> {
        // Before the lock, so that it is dropped after that if it is refused.
        let token = Foreign::new(token);
        let mut range = self.slot.lock_open()?;
        let extent = range.live_extent(offset, bytes)?;
        let is_due = range.leases.add(extent.range(), token);
        // For good: what is queued by then may run long after the token is released.
        range.users.open_to_all();
        drop(range);
        if is_due {
            self.slot.ask_tokens(Asker::Passing, None);
        }
        Ok(())
    }

    /// Whether a token that is not released covers any of the bytes; false if the range was closed.
    pub(crate) fn is_leased(&self, offset: usize, bytes: usize) -> bool {
        let end = offset.saturating_add(bytes);
        self.ask_tokens(Some(&[(offset, bytes)]));
        let range = self.slot.lock_open();
        range.is_ok_and(|range| range.leases.overlap(&(offset..end)))
    }

    /// The bytes under each lease whose token is not released; they may overlap.
    pub(crate) fn leased(&self) -> Vec<ops::Range<usize>> {
        self.ask_tokens(None);
        let range = self.slot.lock_open();
        range.map_or(Vec::new(), |range| range.leases.bytes())
    }

    fn ask_tokens(&self, over: Option<&[(usize, usize)]>) {
        if self.slot.check_process().is_ok() {
            self.slot.ask_tokens(Asker::Waiting, over);
        }
    }
}
