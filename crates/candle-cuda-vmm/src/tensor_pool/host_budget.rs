//! The budget of a pool on a CPU device.

use crate::error::{Result, VmmError};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts the host memory that tensors hold, and enforces a limit.
#[derive(Debug)]
pub(crate) struct HostBudget {
    used_bytes: AtomicUsize,
    limit_bytes: usize,
}

impl HostBudget {
    /// An unused budget. `None` sets no limit.
    pub(super) fn new(limit_bytes: Option<usize>) -> Self {
        Self {
            used_bytes: AtomicUsize::new(0),
            limit_bytes: limit_bytes.unwrap_or(usize::MAX),
        }
    }

    pub(super) fn used_bytes(&self) -> usize {
        self.used_bytes.load(Ordering::Relaxed)
    }

    /// Charges `bytes` to the budget, or fails if the limit leaves fewer.
    pub(crate) fn charge(&self, bytes: usize) -> Result<()> {
        let charge = |used: usize| {
            let used = used.checked_add(bytes)?;
            (used <= self.limit_bytes).then_some(used)
        };
        let relaxed = Ordering::Relaxed;
        match self.used_bytes.fetch_update(relaxed, relaxed, charge) {
            Ok(_) => Ok(()),
            Err(used) => Err(self.shortage(bytes, self.limit_bytes - used)),
        }
    }

    /// Returns charged bytes to the budget.
    pub(crate) fn refund(&self, bytes: usize) {
        self.used_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// The error for a request of `asked_bytes` when only `free_bytes` are free.
    pub(crate) fn shortage(&self, asked_bytes: usize, free_bytes: usize) -> VmmError {
        VmmError::Vmm(cuda_vmm::VmmError::OutOfPhysicalMemory {
            asked_bytes,
            free_bytes,
            retiring_bytes: 0,
            reclaimable_bytes: 0,
            // The host makes no allocation larger than this.
            limit_bytes: self.limit_bytes.min(isize::MAX as usize),
        })
    }
}
