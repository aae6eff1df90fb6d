//! Making room for a guarantee.

use super::inner::Inner;
use super::scope::Scope;
use super::shortage::Shortage;
use super::state::State;
use crate::sync::Arc;
use crate::{QuotaConflict, Result, VmmError};

impl Inner {
    /// Gives a guarantee in the books. What can be spared is given up for it, if that is what is
    /// missing.
    pub(crate) fn make_room_for<T>(
        self: &Arc<Self>,
        guarantee: impl Fn(&mut State) -> Result<T>,
    ) -> Result<T> {
        let mut shortage = Shortage::default();
        loop {
            let mut state = self.state.lock();
            let outcome = guarantee(&mut state);
            state.quietly().starved.note_other_room();
            let Err(VmmError::QuotaUnsatisfiable {
                what: QuotaConflict::Guarantee,
                asked_bytes,
                available_bytes,
            }) = outcome
            else {
                return outcome;
            };
            let tally = state.quietly().look_again();
            let spare_bytes = tally.spare_parked_bytes() + tally.parts().ahead_bytes;
            let is_hopeless = shortage.has_polled() && asked_bytes - available_bytes > spare_bytes;
            if is_hopeless || shortage.relieve(self, state, Scope::All).is_some() {
                return shortage.refused().map_or(outcome, Err);
            }
        }
    }
}
