//! A task that is woken at each change of an engine.

use super::inner::{Engine, Inner};
use crate::foreign::{self, Foreign};
use crate::sync::Arc;
use crate::sync::atomic::Ordering;
use core::task::Waker;

/// One task that waits for changes of an engine. Dropping it ends that.
#[derive(Debug)]
pub(crate) struct Listener {
    engine: Engine,
    number: Option<u64>,
}

impl Listener {
    /// One that is not woken yet.
    pub(crate) fn new(engine: &Engine) -> Self {
        let engine = engine.clone();
        Self {
            engine,
            number: None,
        }
    }

    /// Has this waker woken at each change from now on, in place of an earlier one.
    pub(crate) fn listen(&mut self, waker: &Waker) {
        // Code of others.
        let Some(waker) = foreign::call(|| waker.clone()) else {
            return;
        };
        let waker = Arc::new(Foreign::new(waker));
        let Ok(engine) = self.engine.open() else {
            return;
        };
        let (number, before) = engine.state.listeners.change(|wakers| {
            let number = self.number.unwrap_or(wakers.next);
            wakers.next = wakers.next.max(number + 1);
            (number, wakers.by_number.insert(number, waker))
        });
        if before.is_none() {
            engine.state.waiting.fetch_add(1, Ordering::SeqCst);
        }
        self.number = Some(number);
        // Without the lock.
        drop(before);
    }

    /// Ends it.
    pub(crate) fn stop(&mut self) {
        let Some(number) = self.number.take() else {
            return;
        };
        if let Ok(engine) = self.engine.open() {
            engine.stop_listening(number);
        }
    }
}

impl Inner {
    fn stop_listening(&self, number: u64) {
        let before = (self.state.listeners).change(|wakers| wakers.by_number.remove(&number));
        if before.is_some() {
            self.state.waiting.fetch_sub(1, Ordering::SeqCst);
        }
        drop(before);
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop();
    }
}
