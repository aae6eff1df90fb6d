//! Which process this is, and what only the process that made it may touch.
//!
//! A forked process has one thread, a copy of the one that forked. A lock that another thread held
//! at that moment is held for good there, and what it guards may be half changed. So whatever is
//! reached from outside and has a lock is behind [`Here`], whose one door fails in another process,
//! and statics that lock are [`PerProcess`].
//!
//! # Safety
//! [`PerProcess`] follows pointers to boxes that it never frees.
#![allow(unsafe_code)]

use crate::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use crate::{Result, VmmError};
use core::ptr::null_mut;
use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

/// A process, by its generation. For code that asks often and does not look it up in the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Process(u32);

impl Process {
    /// This one.
    pub(crate) fn current() -> Self {
        Self(fork::generation())
    }

    /// Fails in another process.
    pub(crate) fn check(self) -> Result<()> {
        match self == Self::current() {
            true => Ok(()),
            false => Err(VmmError::Forked),
        }
    }
}

/// What only one process may touch.
#[derive(Debug)]
pub(crate) struct Here<T> {
    process: Process,
    value: T,
}

impl<T> Here<T> {
    pub(crate) const fn new(process: Process, value: T) -> Self {
        Self { process, value }
    }

    /// The value, or [`VmmError::Forked`] in another process.
    pub(crate) fn get(&self) -> Result<&T> {
        self.process.check().map(|()| &self.value)
    }
}

impl<T> Here<Mutex<T>> {
    pub(crate) fn lock(&self) -> Result<MutexGuard<'_, T>> {
        let locked = self.get()?.lock();
        Ok(locked.unwrap_or_else(PoisonError::into_inner))
    }
}

impl<T> Here<RwLock<T>> {
    pub(crate) fn read(&self) -> Result<RwLockReadGuard<'_, T>> {
        let locked = self.get()?.read();
        Ok(locked.unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn write(&self) -> Result<RwLockWriteGuard<'_, T>> {
        let locked = self.get()?.write();
        Ok(locked.unwrap_or_else(PoisonError::into_inner))
    }
}

/// A static that each process has anew, made when it is first asked for. A forked process never
/// sees its parent's.
#[doc(hidden)]
#[derive(Debug)]
pub struct PerProcess<T: 'static>(AtomicPtr<Made<T>>);

/// The value of one process. It is never freed.
#[derive(Debug)]
struct Made<T> {
    process: Process,
    value: T,
}

impl<T: Default + Send + Sync> PerProcess<T> {
    #[allow(clippy::new_without_default, reason = "it is a static")]
    pub const fn new() -> Self {
        Self(AtomicPtr::new(null_mut()))
    }

    /// This process's value.
    pub fn get(&'static self) -> &'static T {
        let process = Process::current();
        let mut latest = self.0.load(Ordering::Acquire);
        loop {
            // SAFETY: the pointer is null or that of a box that is never freed, and only shared
            // references to it exist.
            if let Some(made) = unsafe { latest.as_ref() }
                && made.process == process
            {
                return &made.value;
            }
            let fresh = Box::into_raw(Box::new(Made {
                process,
                value: T::default(),
            }));
            match (self.0).compare_exchange(latest, fresh, Ordering::AcqRel, Ordering::Acquire) {
                // SAFETY: the box was made above, and from here on it is never freed.
                Ok(_) => return unsafe { &(*fresh).value },
                Err(other) => {
                    // SAFETY: the box was made above, and no other code has its address.
                    drop(unsafe { Box::from_raw(fresh) });
                    latest = other;
                }
            }
        }
    }
}

/// Which process has opened something that its children must not use.
pub(crate) struct Opener(AtomicU64);

impl Opener {
    const NONE: u64 = u64::MAX;

    pub(crate) const fn none() -> Self {
        Self(AtomicU64::new(Self::NONE))
    }

    /// Says that this process opens it now, until the result is dropped.
    ///
    /// # Errors
    /// [`VmmError::Forked`] if another process has opened it, or was about to when this one was
    /// forked.
    pub(crate) fn begin(&self) -> Result<Opening<'_>> {
        let Process(here) = Process::current();
        let here = u64::from(here);
        let relaxed = Ordering::Relaxed;
        match (self.0).compare_exchange(Self::NONE, here, relaxed, relaxed) {
            Err(by) if by != here => Err(VmmError::Forked),
            _ => Ok(Opening(self)),
        }
    }
}

/// Dropping it sets the opener back to none.
pub(crate) struct Opening<'a>(&'a Opener);

impl Opening<'_> {
    /// It is open.
    pub(crate) fn has_opened(self) {
        core::mem::forget(self);
    }
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        self.0.0.store(Opener::NONE, Ordering::Relaxed);
    }
}

/// A number that differs after a fork, cheaper to ask than the process's id.
#[cfg(unix)]
mod fork {
    use crate::sync::Apart;
    use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    // Asked by every call, so apart from what others write.
    static GENERATION: Apart<AtomicU32> = Apart(AtomicU32::new(0));
    static REGISTERED: Apart<AtomicBool> = Apart(AtomicBool::new(false));

    extern "C" fn in_the_child() {
        GENERATION.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn generation() -> u32 {
        if !REGISTERED.load(Ordering::Acquire) {
            register();
        }
        GENERATION.load(Ordering::Relaxed)
    }

    /// No lock here either: where two threads register at once, a fork counts twice, and the number
    /// differs all the same.
    #[cold]
    fn register() {
        // SAFETY: the handler is a plain function that adds to an atomic, which is all that may be
        // done between fork and exec. Should the registration fail, a child is not told apart.
        unsafe { libc::pthread_atfork(None, None, Some(in_the_child)) };
        REGISTERED.store(true, Ordering::Release);
    }
}

/// Systems without fork have one process.
#[cfg(not(unix))]
mod fork {
    pub(super) fn generation() -> u32 {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_static_is_made_once_in_a_process() {
        static PLACE: PerProcess<Vec<std::sync::Mutex<usize>>> = PerProcess::new();
        let seen = std::thread::scope(|scope| {
            let threads = [(); 8].map(|()| scope.spawn(|| core::ptr::from_ref(PLACE.get()).addr()));
            threads.map(|thread| thread.join().expect("no panic"))
        });
        assert!(seen.iter().all(|address| *address == seen[0]), "{seen:?}");
    }

    #[test]
    fn what_is_of_another_process_is_not_touched() {
        let Process(here) = Process::current();
        let own = Here::new(Process(here), Mutex::new(7));
        assert_eq!(own.lock().map(|value| *value), Ok(7));
        let foreign = Here::new(Process(here + 1), Mutex::new(7));
        let _held = foreign.value.lock();
        // It would wait for ever.
        assert_eq!(foreign.lock().map(|value| *value), Err(VmmError::Forked));
        let foreign = Here::new(Process(here + 1), RwLock::new(7));
        let _held = foreign.value.write();
        assert_eq!(foreign.read().map(|value| *value), Err(VmmError::Forked));
        assert_eq!(foreign.write().map(|value| *value), Err(VmmError::Forked));
    }
}
