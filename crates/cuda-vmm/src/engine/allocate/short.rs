//! The rung of an allocation for which the budget has no room.

use super::attempt::Attempt;
use super::obstacle::Lack;
use crate::engine::changes::Locked;
use crate::engine::retry::Which;
use crate::engine::scope::Scope;
use crate::engine::state::State;
use crate::engine::waiting::Patience;
use crate::{Result, VmmError};

impl<'a> Attempt<'a> {
    /// Gives up what can be spared. If nothing can, stands in the line and waits as long as the
    /// patience lasts.
    pub(super) fn make_room(&mut self, lack: &Lack, mut state: Locked<'a>) -> Result<Locked<'a>> {
        let engine = self.engine();
        if lack.bytes > lack.refusal.beside_guarantees_bytes {
            return self.await_guarantee(lack, state);
        }
        // At its own ceiling an account is helped by its own memory only.
        let scope = match lack.bytes > lack.refusal.below_ceiling_bytes {
            true => Scope::Account(lack.account),
            false => Scope::All,
        };
        if self.shortage.has_polled() && self.is_beyond_reach(lack, state.quietly()) {
            // What could be spared would be given up for nothing.
            let error = state.quietly().out_of_memory(lack.bytes, &lack.refusal);
            return Err(self.refuse(lack, scope == Scope::All, state, error));
        }
        let Some(mut state) = self.shortage.relieve(engine, state, scope) else {
            return Ok(engine.state.lock());
        };
        if !self.has_retried_all && state.quietly().is_any_refused() {
            // The driver may take it by now, and the worker's next try may be far off.
            self.has_retried_all = true;
            drop(state);
            engine.retry(&Which::Wanted);
            return Ok(engine.state.lock());
        }
        self.await_room(lack, scope, state)
    }

    /// Whether the allocation does not wait for others, and all that comes back without them is not
    /// enough.
    fn is_beyond_reach(&self, lack: &Lack, state: &mut State) -> bool {
        let parts = state.parts();
        let coming_bytes = match self.patience {
            Patience::None => 0,
            Patience::Retiring => parts.retiring_bytes,
            Patience::Until(_) | Patience::Poll => return false,
        };
        let available_bytes = state.available_bytes(lack.account, self.ticket);
        let reach_bytes = available_bytes + coming_bytes + parts.quarantined_bytes;
        !lack.is_over && lack.bytes > reach_bytes
    }

    /// Waits for what comes back by itself, or what others are asked to give back.
    fn await_room(
        &mut self,
        lack: &Lack,
        scope: Scope,
        mut state: Locked<'a>,
    ) -> Result<Locked<'a>> {
        let engine = self.engine();
        let error = state.quietly().out_of_memory(lack.bytes, &lack.refusal);
        if self.is_in_vain(lack, scope, state.quietly()) {
            let error = self.shortage.error_or(error);
            return Err(self.refuse(lack, scope == Scope::All, state, error));
        }
        if scope == Scope::All && state.ledger.awaited_bytes(self.ticket) != Some(lack.bytes) {
            match self.ticket {
                Some(ticket) => state.ledger.wait_for(ticket, lack.bytes),
                None => {
                    let owner = self.asks[0].owner();
                    self.ticket = Some(state.ledger.line_up(owner, lack.bytes));
                }
            }
            // Others are told what they owe for it as the lock is let go.
            drop(state);
            return Ok(engine.state.lock());
        }
        match self.patience.await_memory(engine, state, scope)? {
            Some(state) => Ok(state),
            None if self.keeps_its_place() => Err(error),
            None => Err(self.refuse(lack, scope == Scope::All, engine.state.lock(), error)),
        }
    }

    /// Whether the allocation does not wait, or not for what could come.
    fn is_in_vain(&self, lack: &Lack, scope: Scope, state: &mut State) -> bool {
        match self.patience {
            Patience::None => true,
            // What retires is not what it uses too much of.
            Patience::Retiring if lack.is_over => true,
            Patience::Retiring => {
                let parts = state.parts();
                let tally = state.ranges.tally();
                let retires = |id| {
                    tally
                        .of_range(id)
                        .map_or(0, |range| range.parts.retiring_bytes)
                };
                let retiring_bytes = match scope {
                    Scope::All => parts.retiring_bytes,
                    Scope::Account(own) => {
                        let shared_bytes = state.shared.of_account(own).retiring_bytes;
                        tally.of_account(own).map(retires).sum::<usize>() + shared_bytes
                    }
                    Scope::Range(id) => retires(id),
                };
                retiring_bytes.saturating_add(lack.refusal.free_bytes) < lack.bytes
            }
            Patience::Until(_) | Patience::Poll => false,
        }
    }

    /// Remembers that the allocation was refused memory if others hold it, so that they come to owe
    /// it, or if its account is to be woken when there is some.
    fn refuse(
        &mut self,
        lack: &Lack,
        is_owed: bool,
        mut state: Locked<'_>,
        error: VmmError,
    ) -> VmmError {
        if let Some(ticket) = self.ticket.take() {
            state.ledger.leave_line(ticket);
        }
        if is_owed || state.accounts.is_woken_for_memory(lack.account) {
            let owner = self.asks[0].owner();
            state.ledger.refuse(owner, lack.bytes, is_owed);
        }
        error
    }

    /// Only a guarantee that goes helps: waits for that. No account owes memory for it, and no
    /// thread behind has to wait.
    fn await_guarantee(&mut self, lack: &Lack, mut state: Locked<'a>) -> Result<Locked<'a>> {
        let error = state.quietly().out_of_memory(lack.bytes, &lack.refusal);
        if let Some(ticket) = self.ticket.take() {
            state.ledger.leave_line(ticket);
        }
        match self.patience {
            Patience::None | Patience::Retiring => Err(self.refuse(lack, false, state, error)),
            Patience::Poll => {
                self.would_wait = true;
                Err(error)
            }
            Patience::Until(_) => {
                let engine = self.engine();
                let state = self.patience.await_change(engine, state);
                state.ok_or_else(|| self.refuse(lack, false, engine.state.lock(), error))
            }
        }
    }

    /// Whether the allocation is tried again later and keeps its place until then. Notes that it
    /// would wait here.
    pub(super) fn keeps_its_place(&mut self) -> bool {
        self.would_wait = matches!(self.patience, Patience::Poll);
        self.would_wait
    }
}
