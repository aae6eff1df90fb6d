//! The rung of an allocation for which the budget has no room.

use super::attempt::Attempt;
use super::obstacle::Lack;
use crate::engine::books::range_id::RangeId;
use crate::engine::changes::Locked;
use crate::engine::retry::Which;
use crate::engine::waiting::Patience;
use crate::{Result, VmmError};

impl<'a> Attempt<'a> {
    /// Gives up what can be spared. If nothing can, stands in the line and waits, as long as there
    /// is patience.
    pub(super) fn make_room(&mut self, lack: &Lack, state: Locked<'a>) -> Result<Locked<'a>> {
        let engine = self.engine();
        if lack.bytes > lack.refusal.beside_guarantees_bytes {
            return self.await_guarantee(lack, state);
        }
        // At its own ceiling a range is helped by its own memory only.
        let is_at_ceiling = lack.bytes > lack.refusal.below_ceiling_bytes;
        let only = is_at_ceiling.then_some(self.handle.id());
        let Some(state) = self.shortage.relieve(engine, state, only) else {
            return Ok(engine.state.lock());
        };
        if !self.has_retried_all && state.parts().quarantined_bytes > 0 {
            // The driver may take it by now, and the worker's next try may be far off.
            self.has_retried_all = true;
            drop(state);
            engine.retry(&Which::Wanted);
            return Ok(engine.state.lock());
        }
        self.await_room(lack, only, state)
    }

    /// Waits for what comes back by itself, or what others are asked to give back.
    fn await_room(
        &mut self,
        lack: &Lack,
        only: Option<RangeId>,
        mut state: Locked<'a>,
    ) -> Result<Locked<'a>> {
        let engine = self.engine();
        let error = state.out_of_memory(lack.bytes, &lack.refusal);
        if self.is_in_vain(lack, only, &state) {
            let error = self.shortage.error_or(error);
            return Err(self.refuse(lack, only, state, error));
        }
        if only.is_none() && state.ledger.awaited_bytes(self.ticket) != Some(lack.bytes) {
            match self.ticket {
                Some(ticket) => state.ledger.wait_for(ticket, lack.bytes),
                None => self.ticket = Some(state.ledger.line_up(lack.account, lack.bytes)),
            }
            // Others are told what they owe for it as the lock is let go.
            drop(state);
            return Ok(engine.state.lock());
        }
        match self.patience.await_memory(engine, state, only)? {
            Some(state) => Ok(state),
            None if only.is_some() => Err(error),
            None => Err(self.refuse(lack, only, engine.state.lock(), error)),
        }
    }

    /// Whether the allocation does not wait, or not for what could come.
    fn is_in_vain(&self, lack: &Lack, only: Option<RangeId>, state: &Locked<'_>) -> bool {
        match self.patience {
            Patience::None => true,
            // What retires is not what it uses too much of.
            Patience::Retiring if lack.is_above_ceiling => true,
            Patience::Retiring => {
                let retiring_bytes = match only {
                    Some(_) => self.handle.slot.lock().pages.parts().retiring_bytes,
                    None => state.parts().retiring_bytes,
                };
                retiring_bytes.saturating_add(lack.refusal.free_bytes) < lack.bytes
            }
            Patience::Until(_) => false,
        }
    }

    /// Remembers that the allocation was refused memory that others hold, so that they come to owe
    /// it.
    fn refuse(
        &mut self,
        lack: &Lack,
        only: Option<RangeId>,
        mut state: Locked<'_>,
        error: VmmError,
    ) -> VmmError {
        if only.is_none() {
            if let Some(ticket) = self.ticket.take() {
                state.ledger.leave_line(ticket);
            }
            state.ledger.refuse(lack.account, lack.bytes);
        }
        error
    }

    /// Only a guarantee that goes helps: waits for that. Nobody owes memory for it, and nobody
    /// behind has to wait.
    fn await_guarantee(&mut self, lack: &Lack, mut state: Locked<'a>) -> Result<Locked<'a>> {
        let error = state.out_of_memory(lack.bytes, &lack.refusal);
        if let Some(ticket) = self.ticket.take() {
            state.ledger.leave_line(ticket);
        }
        match self.patience {
            Patience::None | Patience::Retiring => Err(error),
            Patience::Until(_) => {
                let state = self.patience.await_change(self.engine(), state);
                state.ok_or(error)
            }
        }
    }
}
