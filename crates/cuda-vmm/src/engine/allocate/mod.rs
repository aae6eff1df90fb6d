//! An allocation, as a ladder.
//!
//! ```text
//! take_there ── all pages are there, under the range's lock alone: done
//!     │ no
//! Attempt, under the engine's lock
//!     │
//!     ├─► try once ──► Done
//!     │      └── an obstacle, and how it is overcome
//!     │          Leased ──────── ask the tokens of the leases, once
//!     │          Quarantined ─── ask the driver again, once
//!     │          Busy ────────── look what is past, once; wait for the other thread
//!     │          Retiring ────── look what is past, once; have the streams follow, once;
//!     │                          wait for the device
//!     │          Short ───────── look what is past, once; give up what can be spared,
//!     │                          a piece at a time; ask the driver again, once;
//!     │                          stand in the line and wait
//!     │          DeviceShort ─── wait until the device may have memory, and begin anew
//!     └──────────────┘ try again
//! ```
//!
//! If nothing helps, or the patience ends, the obstacle is the error.

mod attempt;
mod fill;
mod obstacle;
mod overcome;
mod short;

use super::changes::Locked;
use super::handle::RangeHandle;
use super::range::{Place, Taken};
use super::waiting::Patience;
use crate::sync::atomic::Ordering;
use crate::{Result, VmmError};
use attempt::{Attempt, Outcome};

impl RangeHandle {
    /// Makes bytes live, backing the pages that are not; returns their offset.
    ///
    /// Waits as `patience` says. An allocation that waits for more than the budget has stands in a
    /// line until it is served.
    pub(crate) fn allocate(
        &self,
        place: Place,
        bytes: usize,
        patience: &Patience,
    ) -> Result<usize> {
        self.slot.check_process()?;
        let taken = match self.take_there(place, bytes) {
            Ok(None) => Attempt::new(self, place, bytes, patience).run(),
            Ok(Some(taken)) => Ok(taken),
            Err(error) => Err(error),
        };
        match taken {
            Ok(taken) => {
                if taken.is_hungry {
                    self.inner().worker.wake(self.inner(), false);
                }
                Ok(taken.offset)
            }
            Err(error) => {
                self.note_out_of_memory(place, bytes, &error);
                Err(error)
            }
        }
    }

    /// Takes what is there already, under the range's lock alone; `None` if that takes more.
    #[inline]
    fn take_there(&self, place: Place, bytes: usize) -> Result<Option<Taken>> {
        let mut range = self.slot.lock();
        // A thread that needs memory sets `is_pressing` before it inspects ranges. This thread
        // reads it after taking the lock, so one of the two sees the other. Then what is parked
        // counts as coming back, and to take it changes what is owed.
        match self.inner().state.is_pressing.load(Ordering::SeqCst) {
            true => Ok(None),
            false => range.take_there(place, bytes),
        }
    }

    /// Counts an allocation that could not be served.
    #[cold]
    fn note_out_of_memory(&self, place: Place, bytes: usize, error: &VmmError) {
        if !error.is_out_of_memory() {
            return;
        }
        self.slot.lock().counters.refusals += 1;
        let is_retryable = error.is_retryable();
        crate::events::debug!(?place, bytes, %error, is_retryable, "memory was refused");
    }
}

impl<'a> Attempt<'a> {
    /// Tries until the bytes are live, or nothing helps any more.
    pub(super) fn run(mut self) -> Result<Taken> {
        let outcome = self.climb();
        if let Some(ticket) = self.ticket.take() {
            // It was not served. Those behind it may be.
            self.engine().state.lock().ledger.leave_line(ticket);
        }
        outcome
    }

    fn climb(&mut self) -> Result<Taken> {
        let engine = self.engine();
        let mut state = engine.state.lock();
        loop {
            state = match self.try_once(state)? {
                Outcome::Done(taken) => return Ok(taken),
                Outcome::Blocked(obstacle, state) => self.overcome(obstacle, state)?,
                Outcome::DeviceShort { error, seen } => {
                    (self.patience).await_device(engine, error, seen, &mut self.backoff)?;
                    self.begin_again();
                    engine.state.lock()
                }
            };
        }
    }

    /// Makes the bytes live, or says what is in the way.
    fn try_once(&mut self, mut state: Locked<'a>) -> Result<Outcome<'a>> {
        let slot = &self.handle.slot;
        let mut range = slot.lock();
        if !range.freed.is_empty() {
            let queue = &mut state.quietly().queue;
            queue.collect(slot.id(), range.freed.drain(..));
            slot.note(&range);
        }
        let charged = self.look(&state, &range).and_then(|mut need| {
            let supply = need.charge(&mut state, self.ticket)?;
            Ok((need, supply))
        });
        match charged {
            Ok((need, supply)) => {
                // The charge took it out of the line.
                self.ticket = None;
                self.fill(state, range, need, supply)
            }
            Err(obstacle) => {
                drop(range);
                Ok(Outcome::Blocked(obstacle, state))
            }
        }
    }
}
