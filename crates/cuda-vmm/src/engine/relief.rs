//! Making room where the device has run out of memory: others' allocations beside the pools', and theirs beside others'.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::refused::Which;
use super::{Engine, Inner};
use crate::Device;
use crate::sync::Arc;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What others in the process do to make room on a device; see [`Device::set_make_room`]. It gets the bytes that are
/// wanted.
pub type MakeRoom = dyn Fn(usize) + Send + Sync;

impl Engine {
    /// Gives at least `bytes` bytes back to the driver, if so much can be spared: memory that was made ahead, cached or
    /// parked. For when another allocator of the process, a framework's for instance, was refused memory by the driver.
    /// Returns the bytes that went.
    ///
    /// Waits for nothing: what is still retiring is not among it. What the driver refuses to take back is in quarantine,
    /// and not counted. In a forked process it does nothing.
    pub fn relieve(&self, bytes: usize) -> usize {
        match self.inner().check_process() {
            Ok(()) => self.inner().relieve(bytes),
            Err(_) => 0,
        }
    }
}

impl Inner {
    /// Gives so many bytes back to the driver, or what can be spared; returns the bytes that went.
    pub(super) fn relieve(self: &Arc<Self>, bytes: usize) -> usize {
        self.poll();
        let mut given_bytes = self.retry(&Which::All);
        while given_bytes < bytes {
            let state = self.lock();
            match self.give_up_one(state, None) {
                Some(outcome) => given_bytes += outcome.unwrap_or_default(),
                None => break,
            }
        }
        self.finish_closing();
        given_bytes
    }
}

/// What was done already for an allocation that the device has no memory for.
#[derive(Debug, Default)]
pub(super) struct Relief {
    engines: bool,
    others: bool,
}

impl Relief {
    /// Whether nothing was done yet.
    pub(super) fn is_first(&self) -> bool {
        !self.engines
    }

    /// Takes the next step; `false` if all were taken. The caller holds no lock.
    pub(super) fn next(&mut self, device: &Device, bytes: usize) -> bool {
        if !self.engines {
            self.engines = true;
            let engines = device.engines();
            engines.iter().for_each(|engine| {
                engine.inner().relieve(usize::MAX);
            });
            device.retry_refused();
            return true;
        }
        if !self.others {
            self.others = true;
            if let Some(make_room) = device.make_room() {
                let called = AssertUnwindSafe(|| make_room(bytes));
                if catch_unwind(called).is_err() {
                    tracing::warn!("what makes room for the pools panicked");
                }
                return true;
            }
        }
        false
    }
}
