//! How long an allocation waits for memory, and what it does meanwhile.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::backoff::Backoff;
use super::ledger::AccountId;
use super::pressure::Ticket;
use super::{Inner, RangeId, State, WorkerMode};
use crate::sync::atomic::Ordering;
use crate::sync::{self, Arc, Deadline, MutexGuard};
use crate::{CaptureGuard, Result, VmmError};
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
        state: MutexGuard<'a, State>,
        patience: &Patience,
    ) -> Option<MutexGuard<'a, State>> {
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
        state: MutexGuard<'a, State>,
        only: Option<RangeId>,
        patience: &Patience,
    ) -> Result<Option<MutexGuard<'a, State>>> {
        match patience {
            Patience::None => Ok(None),
            Patience::Retiring => self.await_progress(state, only),
            Patience::Until(deadline) => Ok(self.await_until(state, deadline)),
        }
    }

    /// Waits for a change or for the moment to look what the device has finished with, and looks.
    fn await_until<'a>(
        self: &'a Arc<Self>,
        mut state: MutexGuard<'a, State>,
        deadline: &Deadline,
    ) -> Option<MutexGuard<'a, State>> {
        let left = deadline.left()?;
        state.collect_freed();
        let has_worker = self.options.worker == WorkerMode::Thread;
        let is_coming = !state.queue.is_empty()
            || (state.ranges.values()).any(|range| range.waits_for_leases());
        if !is_coming {
            // Whoever frees something says so.
            return Some(self.wait_for(state, left));
        }
        let look = if has_worker {
            LOOK_BESIDE_WORKER
        } else {
            LOOK_ALONE
        };
        drop(self.wait_for(state, left.min(look)));
        self.poll();
        if !has_worker && !self.lock().queue.unsynchronised(None).is_empty() {
            // A context that cannot be synchronised gives nothing back, and then the time passes.
            let outcome = CaptureGuard::try_none().map(|_no_capture| self.synchronise());
            if let Some(Err(error)) = outcome {
                tracing::debug!(%error, "the context could not be synchronised");
            }
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
        self.lock().counters.waits += 1;
        let now = sync::now();
        backoff.fail(now);
        self.device.await_memory(seen, left.min(backoff.left(now)));
        Ok(())
    }

    /// Waits until something about the engine's memory has changed, for so long at most.
    fn wait_for<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        left: Duration,
    ) -> MutexGuard<'a, State> {
        if left == Duration::MAX {
            return self.wait(state);
        }
        self.waiting.fetch_add(1, Ordering::SeqCst);
        state.counters.waits += 1;
        // As in `wait`.
        if !state.collect_freed() {
            state = sync::wait_timeout(&self.changed, &self.state, state, left);
        }
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        state
    }

    /// Puts an allocation in the line, or notes how much it needs now, and has others told what they owe for it.
    pub(super) fn stand_in_line(
        &self,
        mut state: MutexGuard<'_, State>,
        ticket: &mut Option<Ticket>,
        account: AccountId,
        bytes: usize,
    ) {
        match *ticket {
            Some(ticket) => state.ledger.wait_for(ticket, bytes),
            None => *ticket = Some(state.ledger.line_up(account, bytes)),
        }
        self.unlock_changed(state);
    }

    /// Gives up a place in the line, if it was not served, so that those behind it may be.
    pub(super) fn leave_line(&self, ticket: Ticket) {
        let mut state = self.lock();
        if state.ledger.leave_line(ticket) {
            self.unlock_changed(state);
        }
    }

    /// Remembers that an allocation was refused memory which others hold, so that they come to owe it.
    pub(super) fn refuse(
        &self,
        mut state: MutexGuard<'_, State>,
        ticket: &mut Option<Ticket>,
        account: AccountId,
        bytes: usize,
        error: VmmError,
    ) -> VmmError {
        if let Some(ticket) = ticket.take() {
            state.ledger.leave_line(ticket);
        }
        state.ledger.refuse(account, bytes);
        self.unlock_changed(state);
        error
    }
}
