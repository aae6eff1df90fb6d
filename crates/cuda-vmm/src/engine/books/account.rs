//! One share of a budget: what it may hold, and what it is charged for.

use crate::{QuotaConflict, Result, VmmError};

/// Names an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct AccountId(pub(super) u64);

impl AccountId {
    /// The number of the account: how many were opened before it.
    pub(crate) fn number(self) -> u64 {
        self.0
    }
}

/// What an account may hold beside the others on its engine, and when it is served.
///
/// ```
/// use cuda_vmm::Quota;
///
/// let quota = Quota::new().guarantee_bytes(2 << 30).priority(1);
/// assert_eq!(quota.ceiling_bytes, None);
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
#[non_exhaustive]
pub struct Quota {
    /// Memory in bytes that is always to be had for it, whatever other accounts do.
    pub guarantee_bytes: usize,
    /// The most memory in bytes that it may hold, if less than the engine's limit.
    pub ceiling_bytes: Option<usize>,
    /// The account with the higher priority is served first if several wait for memory, and is
    /// asked last to give some back. Any number.
    pub priority: i32,
}

impl Quota {
    /// No guarantee, no ceiling, priority 0.
    pub const fn new() -> Self {
        Self {
            guarantee_bytes: 0,
            ceiling_bytes: None,
            priority: 0,
        }
    }

    /// Sets the memory in bytes that is always to be had.
    pub const fn guarantee_bytes(mut self, bytes: usize) -> Self {
        self.guarantee_bytes = bytes;
        self
    }

    /// Sets the most memory in bytes.
    pub const fn ceiling_bytes(mut self, bytes: usize) -> Self {
        self.ceiling_bytes = Some(bytes);
        self
    }

    /// Sets the priority.
    pub const fn priority(mut self, priority: i32) -> Self {
        self.priority = priority;
        self
    }

    /// The ceiling, or the largest number if there is none.
    pub(crate) fn most_bytes(&self) -> usize {
        self.ceiling_bytes.unwrap_or(usize::MAX)
    }

    /// Checks that the guarantee is not above the ceiling.
    pub(super) fn check(&self) -> Result<()> {
        if self.guarantee_bytes <= self.most_bytes() {
            return Ok(());
        }
        Err(VmmError::QuotaUnsatisfiable {
            what: QuotaConflict::GuaranteeAboveCeiling,
            asked_bytes: self.guarantee_bytes,
            available_bytes: self.most_bytes(),
        })
    }
}

/// An account of a ledger.
#[derive(Debug)]
pub(super) struct Account {
    pub(super) quota: Quota,
    pub(super) committed_bytes: usize,
    /// It goes with the last of what it is charged for.
    pub(super) closed: bool,
}

impl Account {
    pub(super) fn new(quota: Quota) -> Self {
        Self {
            quota,
            committed_bytes: 0,
            closed: false,
        }
    }

    /// What its ceiling leaves it, in bytes.
    pub(super) fn below_ceiling(&self) -> usize {
        let most_bytes = self.quota.most_bytes();
        most_bytes.saturating_sub(self.committed_bytes)
    }

    /// What is kept for it beyond what it holds, in bytes.
    pub(super) fn unused_guarantee(&self) -> usize {
        let guarantee_bytes = self.quota.guarantee_bytes;
        guarantee_bytes.saturating_sub(self.committed_bytes)
    }

    pub(super) fn is_above_ceiling(&self) -> bool {
        self.committed_bytes > self.quota.most_bytes() && !self.closed
    }

    /// The same account, if `spare_bytes` of what it holds were given back.
    pub(super) fn without(&self, spare_bytes: usize) -> Self {
        Self {
            committed_bytes: self.committed_bytes.saturating_sub(spare_bytes),
            ..*self
        }
    }
}
