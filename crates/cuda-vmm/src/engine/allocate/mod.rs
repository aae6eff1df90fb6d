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
//!     │          Backlog ─────── let others have the lock
//!     │          Quarantined ─── ask the driver again, once
//!     │          Busy ────────── look what is past, once; wait for the other thread
//!     │          Leaving ─────── look what is past, once; unmap it; wait for the device
//!     │          Retiring ────── look what is past, once; have the streams follow, once;
//!     │                          wait for the device
//!     │          Short ───────── look what is past, once; give up what can be spared,
//!     │                          a piece at a time; ask the driver again, once;
//!     │                          stand in the line and wait
//!     │          DeviceShort ─── wait until the device may have memory, and begin anew
//!     │          Again ───────── another thread has changed what was found
//!     └──────────────┘ try again
//! ```
//!
//! If nothing helps, or the patience ends, the obstacle is the error.
//!
//! An allocation may be about several ranges of one account. It is all or none: all pieces are
//! looked at, the account is charged once for all of them, and all are begun in the books before
//! the lock is let go.

mod ask;
mod attempt;
mod fill;
mod later;
mod need;
mod obstacle;
mod overcome;
mod short;

pub(crate) use ask::Ask;
pub(crate) use later::Later;

use super::changes::Locked;
use super::handle::RangeHandle;
use super::inner::Inner;
use super::range::{Place, Taken};
use super::slot::RangeLock;
use super::waiting::Patience;
use crate::sync::Arc;
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
        match self.take_there(place, bytes) {
            Ok(Some(taken)) => Ok(taken.tell(self.inner())),
            Ok(None) => {
                let places = [(place, bytes)];
                let ask = Ask {
                    handle: self,
                    places: &places,
                    wakes: false,
                };
                allocate_all(&[ask], patience)
            }
            Err(error) => {
                self.note_out_of_memory(place, bytes, &error);
                Err(error)
            }
        }
    }

    /// Makes bytes live under the range's lock alone, if their page has other live bytes; returns
    /// whether it did.
    pub(crate) fn take_beside_live(&self, offset: usize, bytes: usize) -> bool {
        if self.slot.check_process().is_err() {
            return false;
        }
        let taken = self.slot.lock().take_beside_live(offset, bytes);
        taken.map(|taken| taken.tell(self.inner())).is_some()
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

/// Makes the bytes of all asks live, or none, if all their pages are there; returns whether it did.
/// It takes the ranges' locks alone.
///
/// It has all of them at once, so that it looks at every page before it takes the first, and no
/// page has to be given back. It waits for none of them while it has another: if some thread has
/// one, it lets go.
pub(crate) fn take_all_there(asks: &[Ask<'_>]) -> bool {
    let [first, ..] = asks else {
        return true;
    };
    if first.handle.slot.check_process().is_err() {
        return false;
    }
    let ranges = asks.iter().map(|ask| ask.handle.slot.try_lock());
    let Some(mut ranges) = ranges.collect::<Option<Vec<_>>>() else {
        return false;
    };
    let engine = first.handle.inner();
    // As in `RangeHandle::take_there`.
    if engine.state.is_pressing.load(Ordering::SeqCst) {
        return false;
    }
    let mut all = asks.iter().zip(&ranges);
    let is_there = |(ask, range): (&Ask<'_>, &RangeLock<'_>)| {
        let mut places = ask.places.iter();
        places.all(|(place, bytes)| range.is_there(*place, *bytes))
    };
    if !all.all(is_there) {
        return false;
    }
    let mut is_hungry = false;
    for (ask, range) in asks.iter().zip(&mut ranges) {
        for (place, bytes) in ask.places {
            let taken = range.take_there(*place, *bytes);
            debug_assert!(matches!(taken, Ok(Some(_))), "it is there");
            is_hungry |= taken.is_ok_and(|taken| taken.is_some_and(|taken| taken.is_hungry));
        }
    }
    drop(ranges);
    if is_hungry {
        engine.worker.wake(engine, false);
    }
    true
}

/// Makes the bytes of all asks live, or none; returns the offset of the first. There is one ask at
/// least, and each has a place.
pub(crate) fn allocate_all(asks: &[Ask<'_>], patience: &Patience) -> Result<usize> {
    let [first, ..] = asks else {
        return Ok(0);
    };
    first.handle.slot.check_process()?;
    let taken = Attempt::new(asks, patience).run();
    first.tell(taken)
}

impl Ask<'_> {
    /// Ends the call: wakes the worker, or counts the refusal.
    fn tell(&self, taken: Result<Taken>) -> Result<usize> {
        let handle = self.handle;
        match (taken, self.places.first()) {
            (Ok(taken), _) => Ok(taken.tell(handle.inner())),
            (Err(error), Some((place, bytes))) => {
                handle.note_out_of_memory(*place, *bytes, &error);
                Err(error)
            }
            (Err(error), None) => Err(error),
        }
    }
}

impl Taken {
    /// Wakes the worker if it has memory to make ahead now; returns the offset.
    #[inline]
    fn tell(self, engine: &Arc<Inner>) -> usize {
        if self.is_hungry {
            engine.worker.wake(engine, false);
        }
        self.offset
    }
}

impl<'a> Attempt<'a> {
    /// Tries until the bytes are live, or nothing helps any more.
    pub(super) fn run(mut self) -> Result<Taken> {
        let outcome = self.climb();
        self.leave_line();
        outcome
    }

    /// Leaves the line, if it still stands there.
    fn leave_line(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            // It was not served. Those behind it may be.
            self.engine().state.lock().ledger.leave_line(ticket);
        }
    }

    fn climb(&mut self) -> Result<Taken> {
        let engine = self.engine();
        let mut state = engine.state.lock();
        loop {
            state = match self.try_once(state)? {
                Outcome::Done(taken) => return Ok(taken),
                Outcome::Blocked(obstacle, state) => self.overcome(obstacle, state)?,
                Outcome::Again(state) => state,
                Outcome::DeviceShort { error, seen } => {
                    (self.patience).await_device(engine, error, seen, &mut self.backoff)?;
                    self.begin_again();
                    engine.state.lock()
                }
            };
        }
    }

    /// Leaves the line, and forgets what the ranges were refused before: they get what they ask for,
    /// of which `more_bytes` were missing or not in use.
    fn want_no_more(&mut self, state: &mut Locked<'a>, more_bytes: usize) {
        if let Some(ticket) = self.ticket.take() {
            state.ledger.leave_line(ticket);
        }
        for owner in self.asks.iter().map(Ask::owner) {
            if more_bytes > 0 && state.ledger.is_refused(owner) {
                state.ledger.forget(owner);
            }
        }
    }

    /// Makes the bytes live, or says what is in the way.
    fn try_once(&mut self, mut state: Locked<'a>) -> Result<Outcome<'a>> {
        let ticket = self.ticket;
        let looked = self.look_at_all(&mut state);
        let charged = looked.and_then(|(mut needs, held)| {
            let supply = needs.charge(&mut state, ticket)?;
            Ok((needs, held, supply))
        });
        match charged {
            Ok((needs, held, supply)) => self.fill(state, held, needs, supply),
            Err(obstacle) => Ok(Outcome::Blocked(obstacle, state)),
        }
    }
}
