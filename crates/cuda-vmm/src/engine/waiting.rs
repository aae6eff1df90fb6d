//! How long an allocation waits for memory, and what it does meanwhile.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::books::backoff::Backoff;
use super::books::ledger::AccountId;
use super::books::pressure::Ticket;
use super::{Inner, Locked, RangeId};
use crate::sync::{self, Arc, Deadline};
use crate::{Result, VmmError};
use core::time::Duration;

/// How long a thread sleeps at most before it looks for itself what the device has finished with: long where a worker
/// looks anyway.
const LOOK_BESIDE_WORKER: Duration = Duration::from_millis(16);
const LOOK_ALONE: Duration = Duration::from_millis(1);

/// How long a thread waits at first, and at most, before it asks the driver again for memory that the device did not
/// have: another process does not say when it gives some back.
const ASK: Duration = Duration::from_millis(1);
const ASK_MAX: Duration = Duration::from_millis(64);

pub(super) const fn device_backoff() -> Backoff {
    Backoff::new(ASK, ASK_MAX)
}

/// How long an allocation waits.
#[derive(Debug)]
pub(crate) enum Patience {
    /// Not at all.
    None,
    /// For memory that retires, if that is enough.
    Retiring,
    /// For any memory, until then.
    Until(Deadline),
}

impl Patience {
    /// Waits for so long at most.
    pub(crate) fn for_at_most(timeout: Duration) -> Self {
        Self::Until(Deadline::after(timeout))
    }

    pub(super) fn waits(&self) -> bool {
        !matches!(self, Self::None)
    }
}

impl Inner {
    /// Waits until something has changed, as long as there is patience; `None` if there is none left.
    pub(super) fn wait_patiently<'a>(
        &'a self,
        state: Locked<'a>,
        patience: &Patience,
    ) -> Option<Locked<'a>> {
        match patience {
            Patience::None => None,
            Patience::Retiring => Some(self.wait(state)),
            Patience::Until(deadline) => {
                let left = deadline.left()?;
                Some(self.wait_for(state, left))
            }
        }
    }

    /// Waits for what may bring memory, to one range or to any, as long as there is patience; `None` if there is none left,
    /// or nothing that can be waited for.
    pub(super) fn await_patiently<'a>(
        self: &'a Arc<Self>,
        state: Locked<'a>,
        only: Option<RangeId>,
        patience: &Patience,
    ) -> Result<Option<Locked<'a>>> {
        match patience {
            Patience::None => Ok(None),
            Patience::Retiring => self.await_progress(state, only),
            Patience::Until(deadline) => Ok(self.await_until(state, deadline)),
        }
    }

    /// Waits for a change or for the moment to look what the device has finished with, and looks.
    fn await_until<'a>(
        self: &'a Arc<Self>,
        mut state: Locked<'a>,
        deadline: &Deadline,
    ) -> Option<Locked<'a>> {
        let left = deadline.left()?;
        state.quietly().collect_freed();
        let is_coming = !state.queue.is_empty()
            || (state.ranges.values()).any(|range| range.waits_for_leases())
            || state.parts().quarantined_bytes > 0;
        if !is_coming {
            // Whoever frees something says so.
            return Some(self.wait_for(state, left));
        }
        let look = match self.worker.is_there() {
            true => LOOK_BESIDE_WORKER,
            false => LOOK_ALONE,
        };
        drop(self.wait_for(state, left.min(look)));
        // The worker may have died since. What it does not do, this thread does.
        match self.worker.is_there() {
            true => _ = self.poll(),
            false => _ = self.step(true),
        }
        Some(self.lock())
    }

    /// The budget had room, and the device had no memory: waits until some of the device's comes free in this process, or
    /// until the next try is due, as long as there is patience; then the error. The caller holds no lock and no pages.
    pub(super) fn await_device(
        &self,
        error: VmmError,
        patience: &Patience,
        seen: u64,
        backoff: &mut Backoff,
    ) -> Result<()> {
        let Patience::Until(deadline) = patience else {
            return Err(error);
        };
        let left = deadline.left().ok_or(error)?;
        self.lock().quietly().counters.waits += 1;
        let now = sync::now();
        backoff.fail(now);
        self.device.await_memory(seen, left.min(backoff.left(now)));
        Ok(())
    }

    /// Puts an allocation in the line, or notes how much it needs now, and has others told what they owe for it.
    pub(super) fn stand_in_line(
        &self,
        mut state: Locked<'_>,
        ticket: &mut Option<Ticket>,
        account: AccountId,
        bytes: usize,
    ) {
        match *ticket {
            Some(ticket) => state.ledger.wait_for(ticket, bytes),
            None => *ticket = Some(state.ledger.line_up(account, bytes)),
        }
    }

    /// Gives up a place in the line, if it was not served, so that those behind it may be.
    pub(super) fn leave_line(&self, ticket: Ticket) {
        self.lock().ledger.leave_line(ticket);
    }

    /// Remembers that an allocation was refused memory which others hold, so that they come to owe it.
    pub(super) fn refuse(
        &self,
        mut state: Locked<'_>,
        ticket: &mut Option<Ticket>,
        account: AccountId,
        bytes: usize,
        error: VmmError,
    ) -> VmmError {
        if let Some(ticket) = ticket.take() {
            state.ledger.leave_line(ticket);
        }
        state.ledger.refuse(account, bytes);
        error
    }
}
