//! One share of a budget: what it may hold, and what it is charged for.

use super::comes_back::ComesBack;
use super::holders::Holder;
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
    /// What comes back of it without its owner's doing.
    pub(super) comes_back: ComesBack,
    /// What is being released of it, in bytes.
    pub(super) releasing_bytes: usize,
    /// What comes back of its shared chunks, in bytes.
    pub(super) shared_coming_bytes: usize,
    /// Whether it is among those that have changed since what is owed was worked out.
    pub(super) is_changed: bool,
    /// It goes with the last of what it is charged for.
    pub(super) closed: bool,
}

impl Account {
    pub(super) fn new(quota: Quota) -> Self {
        Self {
            quota,
            committed_bytes: 0,
            comes_back: ComesBack::default(),
            releasing_bytes: 0,
            shared_coming_bytes: 0,
            is_changed: false,
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

    /// What it holds, less what comes back without its owner's doing, in bytes.
    pub(super) fn used_bytes(&self) -> usize {
        let coming_bytes =
            self.comes_back.coming_bytes + self.releasing_bytes + self.shared_coming_bytes;
        self.committed_bytes.saturating_sub(coming_bytes)
    }

    /// What it holds, less what is given up if it is needed, in bytes.
    pub(super) fn kept_bytes(&self) -> usize {
        let spare_bytes = self.comes_back.spare_bytes;
        self.committed_bytes.saturating_sub(spare_bytes)
    }

    /// What others cannot have if this much of what it holds stays, in bytes.
    pub(super) fn spoken_for(&self, bytes: usize) -> usize {
        bytes.max(self.quota.guarantee_bytes)
    }

    /// How it bears on what others want; `None` if it is closed.
    pub(super) fn holder(&self) -> Option<Holder> {
        (!self.closed).then(|| Holder {
            priority: self.quota.priority,
            guarantee_bytes: self.quota.guarantee_bytes,
            ceiling_bytes: self.quota.most_bytes(),
            used_bytes: self.used_bytes(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_is_called_by_its_number() {
        assert_eq!(
            [0, 1, 7].map(|number| AccountId(number).number()),
            [0, 1, 7]
        );
    }

    #[test]
    fn what_comes_back_in_any_way_is_not_used_and_what_is_spare_is_not_kept() {
        let mut account = Account::new(Quota::new());
        account.committed_bytes = 100;
        account.comes_back = ComesBack {
            coming_bytes: 30,
            spare_bytes: 12,
        };
        account.releasing_bytes = 4;
        account.shared_coming_bytes = 1;
        assert_eq!((account.used_bytes(), account.kept_bytes()), (65, 88));
    }
}
