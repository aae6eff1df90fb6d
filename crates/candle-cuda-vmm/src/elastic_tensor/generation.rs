//! How often rows have left their addresses.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// How often the rows in some addresses have left them.
#[derive(Debug, Default)]
pub(super) struct Generation(AtomicU64);

impl Generation {
    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The owner of a generation, which ends when it is dropped. Those that look at it may outlive it.
#[derive(Debug, Default)]
pub(super) struct Rising(Arc<Generation>);

impl Rising {
    pub(super) fn generation(&self) -> &Arc<Generation> {
        &self.0
    }

    /// Notes that the rows were dropped or have moved, or that other rows share their memory.
    pub(super) fn end(&self) {
        self.0.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Rising {
    fn drop(&mut self) {
        self.end();
    }
}
