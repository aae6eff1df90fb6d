//! What a range owes, which its owner reads without a lock, and the waker for when it owes more.

use crate::foreign::{self, Foreign};
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Arc, Mutex, PoisonError};
use core::task::Waker;

/// What one range owes.
#[derive(Debug, Default)]
pub(crate) struct Owed {
    bytes: AtomicUsize,
    /// Shared, so that the owner's code that clones it is never called with a lock held.
    waker: Mutex<Option<Arc<Foreign<Waker>>>>,
}

impl Owed {
    /// What is owed now, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::SeqCst)
    }

    /// Notes what is owed now; returns whether it is more than before.
    pub(crate) fn set(&self, bytes: usize) -> bool {
        self.bytes.swap(bytes, Ordering::SeqCst) < bytes
    }

    /// Says whom to wake from now on. What was there before is dropped here, without the lock.
    pub(crate) fn set_waker(&self, waker: Option<Waker>) {
        let waker = waker.map(|waker| Arc::new(Foreign::new(waker)));
        let mut held = self.waker.lock().unwrap_or_else(PoisonError::into_inner);
        let before = core::mem::replace(&mut *held, waker);
        drop(held);
        drop(before);
    }

    fn wake(&self) {
        let held = self.waker.lock().unwrap_or_else(PoisonError::into_inner);
        let waker = held.clone();
        drop(held);
        // Dropped here, without the lock: this may be the last that holds it.
        if let Some(waker) = waker
            && foreign::call(|| waker.wake_by_ref()).is_none()
        {
            crate::events::warn!("a waker panicked");
        }
    }
}

/// Wakes the owners of ranges that owe more. The caller holds no lock.
pub(crate) fn wake(owing: Vec<Arc<Owed>>) {
    owing.iter().for_each(|owed| owed.wake());
}
