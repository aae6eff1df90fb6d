//! The protocol of changes: how a thread that waits for memory learns that some came free.
//!
//! ```text
//!  a thread that waits                        a thread that changes something
//!  -------------------                        -------------------------------
//!  lock the engine                            lock the engine
//!  look: nothing for it                       change the state: the guard notes it
//!  waiting += 1                               let go of the guard:
//!  collect what ranges have freed               work out what is owed
//!  wait for `changed` (lets the lock go)        unlock
//!  waiting -= 1, look again                     notify all, if waiting > 0
//!                                               wake accounts that owe more
//!
//!                                             a thread that frees under a range's lock alone
//!                                             ----------------------------------------------
//!                                             leave what was freed in the range, mark the range
//!                                             if waiting > 0 or is_pressing: as on the left
//! ```
//!
//! No caller has to remember to wake a thread. [`Locked`] is the one way to the state, and each
//! mutable access to the state, or to a range through it, is a change. A change that can serve no
//! other thread, such as that of a counter, goes through `quietly`. Without that exception two
//! threads that wait could wake each other for ever.
//!
//! A thread that frees under a range's lock alone marks the range before it reads `waiting`; a
//! thread that waits raises `waiting` before it reads the marks. So one of the two sees the other.
//! [`State::share_out`] sets `is_pressing` before it reads the ranges for the same reason.

use super::owed::Wakers;
use super::state::{State, StateLock};
use crate::sync::atomic::Ordering;
use crate::sync::{self, MutexGuard, PoisonError};
use core::ops::{Deref, DerefMut};
use core::time::Duration;

/// The engine's state, locked. Dropping it wakes the threads and owners that a change concerns.
///
/// That runs wakers, which are code of others: no range is locked when it is dropped.
#[derive(Debug)]
pub(crate) struct Locked<'a> {
    lock: &'a StateLock,
    /// None only while it is dropped.
    state: Option<MutexGuard<'a, State>>,
    is_changed: bool,
}

impl Locked<'_> {
    /// The state, for a change that can serve no other thread and changes nothing that is owed.
    pub(crate) fn quietly(&mut self) -> &mut State {
        match &mut self.state {
            Some(state) => state,
            None => unreachable!("it is let go by value only"),
        }
    }

    /// Notes a change that was made quietly, or under a range's lock alone.
    pub(crate) fn note_change(&mut self) {
        self.is_changed = true;
    }

    fn is_changed(&self) -> bool {
        self.is_changed || self.ranges.is_changed()
    }
}

impl Deref for Locked<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        match &self.state {
            Some(state) => state,
            None => unreachable!("it is let go by value only"),
        }
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut State {
        self.is_changed = true;
        self.quietly()
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        let Some(mut state) = self.state.take() else {
            return;
        };
        if !(state.ranges.take_changed() | self.is_changed) {
            return;
        }
        // A panic of our own must not become two.
        let mut wakers = match std::thread::panicking() {
            true => Wakers::default(),
            false => state.share_out(&self.lock.is_pressing),
        };
        let is_awaited = self.lock.waiting.load(Ordering::SeqCst) > 0;
        drop(state);
        if is_awaited {
            self.lock.changed.notify_all();
            wakers.extend(self.lock.listeners.all());
        }
        wakers.wake();
    }
}

impl StateLock {
    pub(crate) fn lock(&self) -> Locked<'_> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.locked(state)
    }

    fn locked<'a>(&'a self, state: MutexGuard<'a, State>) -> Locked<'a> {
        Locked {
            lock: self,
            state: Some(state),
            is_changed: false,
        }
    }

    /// Wakes the threads that wait, and the owners that owe, after a change under a range's lock
    /// alone. The caller has released that lock.
    pub(crate) fn tell(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 || self.is_pressing.load(Ordering::SeqCst) {
            self.lock().note_change();
        }
    }

    /// Waits until something about the engine's memory has changed.
    pub(crate) fn wait<'a>(&'a self, state: Locked<'a>) -> Locked<'a> {
        self.wait_for(state, Duration::MAX)
    }

    /// Waits until something about the engine's memory has changed, for `left` at most. May return
    /// before, so callers look again.
    pub(crate) fn wait_for<'a>(&'a self, mut state: Locked<'a>, left: Duration) -> Locked<'a> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        // What was freed since the lock was taken, by threads that did not see yet that this one
        // waits.
        let has_freed = state.quietly().collect_freed() > 0;
        if state.is_changed() {
            // Other threads learn of this thread's change before it sleeps.
            drop(state);
            state = self.lock();
        } else if !has_freed {
            state.quietly().counters.waits += 1;
            if let Some(guard) = state.state.take() {
                let guard = match left {
                    Duration::MAX => {
                        let waited = self.changed.wait(guard);
                        waited.unwrap_or_else(PoisonError::into_inner)
                    }
                    left => sync::wait_timeout(&self.changed, &self.state, guard, left),
                };
                state = self.locked(guard);
            }
        }
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        state
    }
}
