//! What every call does that needs more memory than the budget has: an allocation, a guarantee, a
//! compaction.
//!
//! ```text
//! look what the device has finished with ── once
//! give up what can be spared ────────────── a piece at a time: made ahead, cached, parked
//! ```
//!
//! After each piece the caller tries again, so it takes from others what is missing, and at most a
//! piece more.

use super::changes::Locked;
use super::drain::GivenUp;
use super::inner::Inner;
use super::scope::Scope;
use crate::VmmError;
use crate::sync::Arc;

/// What one call has done so far against a shortage.
#[derive(Debug, Default)]
pub(crate) struct Shortage {
    polled: bool,
    /// Why the driver would not take back what was given up for this.
    refused: Option<VmmError>,
}

impl Shortage {
    /// Whether the call has looked what the device has finished with.
    pub(crate) fn has_polled(&self) -> bool {
        self.polled
    }

    /// Has the next [`poll`](Self::poll) look again.
    pub(crate) fn begin_again(&mut self) {
        self.polled = false;
    }

    /// Takes the next step against the shortage. At its own ceiling an account is helped by its own
    /// memory only: `scope` names it then. Returns the lock if nothing is left to do, and `None` if
    /// the caller is to look again.
    pub(crate) fn relieve<'a>(
        &mut self,
        engine: &Arc<Inner>,
        state: Locked<'a>,
        scope: Scope,
    ) -> Option<Locked<'a>> {
        let state = self.poll(engine, state)?;
        match engine.give_up_one(state, scope) {
            GivenUp::Nothing(state) => return Some(state),
            GivenUp::Piece(Ok(_)) => {}
            GivenUp::Piece(Err(error)) => self.refused = Some(error),
        }
        None
    }

    /// Looks what the device has finished with. Returns the lock if the call has done so before.
    pub(crate) fn poll<'a>(
        &mut self,
        engine: &Arc<Inner>,
        state: Locked<'a>,
    ) -> Option<Locked<'a>> {
        if core::mem::replace(&mut self.polled, true) {
            return Some(state);
        }
        drop(state);
        engine.poll();
        engine.state.lock().quietly().queue.was_looked_through();
        None
    }

    /// Why the call has no memory: what the driver refused, if it did, or else this error.
    pub(crate) fn error_or(&mut self, error: VmmError) -> VmmError {
        self.refused.take().unwrap_or(error)
    }

    /// What the driver refused, if it did.
    pub(crate) fn refused(self) -> Option<VmmError> {
        self.refused
    }
}
