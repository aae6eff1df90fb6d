//! Code of others: lease tokens, wakers, what makes room on a device, and subscribers of `tracing`.
//!
//! It may panic, take long, and call the pools. So it runs with no lock held, and a panic in it
//! ends here.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use core::fmt;
use core::ops::{Deref, DerefMut};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Calls code of others; `None` if it panicked. The caller holds no lock.
pub(crate) fn call<T>(code: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(code)).map_or_else(
        |payload| {
            // What it panicked with is theirs too, and so is its drop.
            if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
                core::mem::forget(again);
            }
            None
        },
        Some,
    )
}

/// A value of others. A panic in its drop ends here; the owner drops it with no lock held.
///
/// `Debug` prints nothing of it: that is their code as well, and a thread that prints a pool may
/// hold a lock.
pub(crate) struct Foreign<T>(Option<T>);

impl<T> Foreign<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Some(value))
    }
}

impl<T> Deref for Foreign<T> {
    type Target = T;

    fn deref(&self) -> &T {
        match &self.0 {
            Some(value) => value,
            None => unreachable!("only `drop` takes it"),
        }
    }
}

impl<T> DerefMut for Foreign<T> {
    fn deref_mut(&mut self) -> &mut T {
        match &mut self.0 {
            Some(value) => value,
            None => unreachable!("only `drop` takes it"),
        }
    }
}

impl<T> Drop for Foreign<T> {
    fn drop(&mut self) {
        let value = self.0.take();
        if call(|| drop(value)).is_none() {
            crate::events::warn!("a value of the caller's panicked when it was dropped");
        }
    }
}

impl<T> fmt::Debug for Foreign<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(core::any::type_name::<T>())
    }
}
