//! The wakers of tasks that are woken at each change of an engine, as threads that wait are.

use crate::foreign::Foreign;
use crate::sync::{Arc, Mutex, PoisonError};
use core::task::Waker;
use std::collections::BTreeMap;

/// The wakers of tasks that wait for a change.
#[derive(Debug, Default)]
pub(crate) struct Listeners(Mutex<Wakers>);

#[derive(Debug, Default)]
pub(crate) struct Wakers {
    pub(crate) by_number: BTreeMap<u64, Arc<Foreign<Waker>>>,
    pub(crate) next: u64,
}

impl Listeners {
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut Wakers) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// All wakers, to be woken when no lock is held.
    pub(crate) fn all(&self) -> Vec<Arc<Foreign<Waker>>> {
        self.change(|wakers| wakers.by_number.values().cloned().collect())
    }
}
