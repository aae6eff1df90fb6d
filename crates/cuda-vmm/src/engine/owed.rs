//! What an account owes, which is read without a lock, and the wakers of its owner.

use crate::foreign::{self, Foreign};
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Arc, Mutex, PoisonError};
use core::task::Waker;

/// What one account owes, and the task to wake for it.
#[derive(Debug, Default)]
pub(crate) struct Owed {
    bytes: AtomicUsize,
    /// Woken when it owes more.
    pub(crate) more: WakerCell,
    /// Woken when there may be memory that it was refused.
    pub(crate) memory: WakerCell,
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
}

/// A waker of the caller's, or none.
///
/// It is shared, so that code of others that clones or drops it is never called with a lock held.
#[derive(Debug, Default)]
pub(crate) struct WakerCell(Mutex<Option<Arc<Foreign<Waker>>>>);

impl WakerCell {
    /// Replaces the waker. The one before is dropped here, without the lock.
    pub(crate) fn set(&self, waker: Option<Waker>) {
        let waker = waker.map(|waker| Arc::new(Foreign::new(waker)));
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = core::mem::replace(&mut *held, waker);
        drop(held);
        drop(before);
    }

    /// Whether there is a waker.
    pub(crate) fn is_set(&self) -> bool {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.is_some()
    }

    /// The waker, to be woken when no lock is held.
    fn get(&self) -> Option<Arc<Foreign<Waker>>> {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.clone()
    }
}

/// Wakers of others that are to be woken when the engine's lock is let go.
#[derive(Debug, Default)]
pub(crate) struct Wakers(Vec<Arc<Foreign<Waker>>>);

impl Wakers {
    /// Adds the waker of a cell, if there is one.
    pub(crate) fn add(&mut self, cell: &WakerCell) {
        self.0.extend(cell.get());
    }

    /// Adds wakers that are shared already.
    pub(crate) fn extend(&mut self, wakers: impl IntoIterator<Item = Arc<Foreign<Waker>>>) {
        self.0.extend(wakers);
    }

    /// Wakes all of them. The caller holds no lock.
    pub(crate) fn wake(self) {
        for waker in self.0 {
            if foreign::call(|| waker.wake_by_ref()).is_none() {
                crate::events::warn!("a waker panicked");
            }
        }
    }
}
