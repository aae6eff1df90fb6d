//! The one place where locks, condition variables, atomics and threads come from.
//!
//! They are the standard library's. Under `cfg(model_check)` they are a model checker's, which
//! decides at each of their operations which thread goes on; the scenarios in `model-check` explore
//! the engine so. Out of that stays what has no part in how threads meet: which process this is,
//! and the driver library, which is opened once.
#![forbid(unsafe_code)]

#[cfg(not(model_check))]
pub(crate) use std::thread_local;
#[cfg(not(model_check))]
pub(crate) use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        TryLockError, Weak, atomic,
    },
    thread,
};

#[cfg(model_check)]
pub(crate) use shuttle::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        TryLockError, Weak, atomic,
    },
    thread, thread_local,
};

use core::ops::Deref;
use std::time::Duration;

/// A value on cache lines of its own. Writes beside it do not slow its readers, nor the other way
/// round. Processors fetch lines of 64 bytes in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Apart<T>(pub(crate) T);

impl<T> Deref for Apart<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// For how many turns [`rest`] leaves the processor to others: some microseconds.
const REST_TURNS: usize = if cfg!(model_check) { 1 } else { 20 };

/// Lets others have a lock, of ours or the driver's, that this thread takes again at once. Neither
/// is a fair one: without this a thread that wants it could wait until all is done.
pub(crate) fn rest() {
    (0..REST_TURNS).for_each(|_| thread::yield_now());
}

/// Declares statics that hold what this module hands out.
///
/// Under the model checker each execution begins with new ones: a thread of an execution that is
/// over must not wait in the next. Else they are [`PerProcess`](crate::PerProcess).
#[cfg(model_check)]
macro_rules! statics {
    ($(static $name:ident: $type:ty = $value:expr;)*) => {
        shuttle::lazy_static! { $(static ref $name: $type = $value;)* }
    };
}
#[cfg(model_check)]
pub(crate) use statics;

/// The time since some moment, for delays.
#[cfg(not(model_check))]
pub(crate) fn now() -> Duration {
    static START: std::sync::LazyLock<std::time::Instant> =
        std::sync::LazyLock::new(std::time::Instant::now);
    START.elapsed()
}

/// The model checker knows no time: an hour has passed at each look, so that each delay is over.
#[cfg(model_check)]
pub(crate) fn now() -> Duration {
    static LOOKS: core::sync::atomic::AtomicU32 = core::sync::atomic::AtomicU32::new(0);
    let looks = LOOKS.fetch_add(1, core::sync::atomic::Ordering::Relaxed);
    Duration::from_secs(3600) * looks
}

/// When a wait is over.
#[cfg(not(model_check))]
#[derive(Debug)]
pub(crate) struct Deadline(Option<std::time::Instant>);

#[cfg(not(model_check))]
impl Deadline {
    /// So long from now; never, if the clock does not reach so far.
    pub(crate) fn after(timeout: Duration) -> Self {
        Self(std::time::Instant::now().checked_add(timeout))
    }

    /// The time that is left; `Duration::MAX` if it never comes, `None` if it is past.
    pub(crate) fn left(&self) -> Option<Duration> {
        let Some(end) = self.0 else {
            return Some(Duration::MAX);
        };
        let left = end.saturating_duration_since(std::time::Instant::now());
        (!left.is_zero()).then_some(left)
    }
}

/// The model checker knows no time: a second is one wait.
#[cfg(model_check)]
#[derive(Debug)]
pub(crate) struct Deadline(core::cell::Cell<u64>);

#[cfg(model_check)]
impl Deadline {
    pub(crate) fn after(timeout: Duration) -> Self {
        Self(core::cell::Cell::new(timeout.as_secs()))
    }

    pub(crate) fn left(&self) -> Option<Duration> {
        let waits = self.0.get();
        if waits == u64::MAX {
            return Some(Duration::MAX);
        }
        self.0.set(waits.checked_sub(1)?);
        Some(Duration::from_secs(1))
    }
}

/// Waits to be notified, for so long at most. `guard` is that of `mutex`.
#[cfg(not(model_check))]
pub(crate) fn wait_timeout<'a, T>(
    condvar: &Condvar,
    _mutex: &'a Mutex<T>,
    guard: MutexGuard<'a, T>,
    timeout: Duration,
) -> MutexGuard<'a, T> {
    let waited = condvar.wait_timeout(guard, timeout);
    waited.unwrap_or_else(PoisonError::into_inner).0
}

/// As [`wait_timeout_while`]: others go first, and the checker says when the time is over.
#[cfg(model_check)]
pub(crate) fn wait_timeout<'a, T>(
    condvar: &Condvar,
    mutex: &'a Mutex<T>,
    guard: MutexGuard<'a, T>,
    timeout: Duration,
) -> MutexGuard<'a, T> {
    wait_timeout_while(condvar, mutex, guard, timeout, |_| true)
}

/// Waits while the condition holds, for so long at most. `guard` is that of `mutex`.
#[cfg(not(model_check))]
#[inline]
pub(crate) fn wait_timeout_while<'a, T>(
    condvar: &Condvar,
    _mutex: &'a Mutex<T>,
    guard: MutexGuard<'a, T>,
    timeout: Duration,
    condition: impl FnMut(&mut T) -> bool,
) -> MutexGuard<'a, T> {
    let waited = condvar.wait_timeout_while(guard, timeout, condition);
    waited.unwrap_or_else(PoisonError::into_inner).0
}

/// The model checker knows no time, and its condition variable never times out. Any delay may be
/// over at any moment. So this lets all other threads go first, and the checker chooses the moment.
#[cfg(model_check)]
pub(crate) fn wait_timeout_while<'a, T>(
    _condvar: &Condvar,
    mutex: &'a Mutex<T>,
    mut guard: MutexGuard<'a, T>,
    _timeout: Duration,
    mut condition: impl FnMut(&mut T) -> bool,
) -> MutexGuard<'a, T> {
    if !condition(&mut guard) {
        return guard;
    }
    drop(guard);
    thread::yield_now();
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
