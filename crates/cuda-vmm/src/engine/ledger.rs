//! The budget of an engine, and who is charged for what.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use crate::{Result, VmmError};
use std::collections::BTreeMap;

/// Names an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct AccountId(u64);

/// What an account may hold, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Quota {
    /// Memory that is always to be had for it, whatever others do.
    pub(crate) guarantee_bytes: usize,
    /// The most that it may hold.
    pub(crate) ceiling_bytes: usize,
}

impl Quota {
    /// Of an account that is closed.
    const NOTHING: Self = Self {
        guarantee_bytes: 0,
        ceiling_bytes: 0,
    };
}

impl Default for Quota {
    fn default() -> Self {
        Self {
            guarantee_bytes: 0,
            ceiling_bytes: usize::MAX,
        }
    }
}

#[derive(Debug)]
struct Account {
    quota: Quota,
    committed_bytes: usize,
    /// It goes with the last of what it is charged for.
    closed: bool,
}

impl Account {
    fn below_ceiling(&self) -> usize {
        self.quota
            .ceiling_bytes
            .saturating_sub(self.committed_bytes)
    }

    fn unused_guarantee(&self) -> usize {
        self.quota
            .guarantee_bytes
            .saturating_sub(self.committed_bytes)
    }
}

/// A charge that was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// What the account could have had, in bytes.
    pub(crate) free_bytes: usize,
    /// What its ceiling leaves it, in bytes: with less than is needed, nobody else's memory would help.
    pub(crate) below_ceiling_bytes: usize,
    /// The most that the account may ever hold, in bytes.
    pub(crate) limit_bytes: usize,
}

/// One budget in bytes, divided among accounts.
///
/// A charge within an account's guarantee always fits; one beyond it is admitted only if it leaves room
/// for the unused guarantees of all others. That, not reclaiming, is what makes a guarantee hold.
#[derive(Debug)]
pub(crate) struct Ledger {
    limit_bytes: usize,
    /// Of all accounts.
    committed_bytes: usize,
    /// Held on nobody's account, and given up before anyone is refused.
    cached_bytes: usize,
    unused_guarantee_bytes: usize,
    accounts: BTreeMap<AccountId, Account>,
    next: u64,
}

impl Ledger {
    pub(crate) fn new(limit_bytes: usize) -> Self {
        Self {
            limit_bytes,
            committed_bytes: 0,
            cached_bytes: 0,
            unused_guarantee_bytes: 0,
            accounts: BTreeMap::new(),
            next: 0,
        }
    }

    /// What is held, on accounts and in the cache.
    pub(crate) fn committed_bytes(&self) -> usize {
        self.committed_bytes + self.cached_bytes
    }

    /// Moves what an account is charged for to the cache.
    pub(crate) fn put_in_cache(&mut self, id: AccountId, bytes: usize) {
        self.refund(id, bytes);
        self.cached_bytes += bytes;
    }

    /// What was taken from the cache is in it again.
    pub(crate) fn restock(&mut self, bytes: usize) {
        self.cached_bytes += bytes;
    }

    /// What is no longer in the cache is nobody's.
    pub(crate) fn take_from_cache(&mut self, bytes: usize) {
        self.cached_bytes -= bytes;
    }

    /// Opens an account, if its guarantee can hold beside what is committed and guaranteed already.
    pub(crate) fn open(&mut self, quota: Quota) -> Result<AccountId> {
        if quota.ceiling_bytes < quota.guarantee_bytes {
            return Err(VmmError::QuotaUnsatisfiable {
                what: "guarantee above its ceiling",
                asked_bytes: quota.guarantee_bytes,
                available_bytes: quota.ceiling_bytes,
            });
        }
        let available_bytes = self
            .limit_bytes
            .saturating_sub(self.committed_bytes)
            .saturating_sub(self.unused_guarantee_bytes);
        if quota.guarantee_bytes > available_bytes {
            return Err(VmmError::QuotaUnsatisfiable {
                what: "guarantee",
                asked_bytes: quota.guarantee_bytes,
                available_bytes,
            });
        }
        let id = AccountId(self.next);
        self.next += 1;
        self.unused_guarantee_bytes += quota.guarantee_bytes;
        self.accounts.insert(
            id,
            Account {
                quota,
                committed_bytes: 0,
                closed: false,
            },
        );
        Ok(id)
    }

    /// Gives up an account's guarantee; what it still holds stays charged until it is refunded.
    pub(crate) fn close(&mut self, id: AccountId) {
        if let Some(account) = self.accounts.get_mut(&id) {
            self.unused_guarantee_bytes -= account.unused_guarantee();
            account.quota = Quota::NOTHING;
            account.closed = true;
            if account.committed_bytes == 0 {
                self.accounts.remove(&id);
            }
        }
    }

    /// Bytes that the account could be charged now.
    fn free_bytes(&self, account: &Account) -> usize {
        let others = self.unused_guarantee_bytes - account.unused_guarantee();
        let in_budget = self
            .limit_bytes
            .saturating_sub(self.committed_bytes())
            .saturating_sub(others);
        in_budget.min(account.below_ceiling())
    }

    /// What the account could be charged now: the budget's room and its own.
    pub(crate) fn room(&self, id: AccountId) -> Refusal {
        let account = self.accounts.get(&id);
        Refusal {
            free_bytes: account.map_or(0, |account| self.free_bytes(account)),
            below_ceiling_bytes: account.map_or(0, Account::below_ceiling),
            limit_bytes: self.account_limit_bytes(id),
        }
    }

    /// The most that an account may ever hold, in bytes: its ceiling, and what others are not guaranteed.
    pub(crate) fn account_limit_bytes(&self, id: AccountId) -> usize {
        let others = self.accounts.iter().filter(|(other, _)| **other != id);
        let guaranteed: usize = others.map(|(_, other)| other.quota.guarantee_bytes).sum();
        let ceiling_bytes =
            (self.accounts.get(&id)).map_or(0, |account| account.quota.ceiling_bytes);
        self.limit_bytes
            .saturating_sub(guaranteed)
            .min(ceiling_bytes)
    }

    /// Charges an account, or says what it could have had.
    pub(crate) fn charge(&mut self, id: AccountId, bytes: usize) -> Result<(), Refusal> {
        let none = Refusal {
            free_bytes: 0,
            below_ceiling_bytes: 0,
            limit_bytes: 0,
        };
        let account = self.accounts.get(&id).ok_or(none)?;
        let free_bytes = self.free_bytes(account);
        if bytes > free_bytes {
            return Err(Refusal {
                free_bytes,
                below_ceiling_bytes: account.below_ceiling(),
                limit_bytes: self.account_limit_bytes(id),
            });
        }
        self.change(id, |committed| committed + bytes);
        self.committed_bytes += bytes;
        Ok(())
    }

    /// Takes back a charge.
    pub(crate) fn refund(&mut self, id: AccountId, bytes: usize) {
        debug_assert!(self.account_bytes(id) >= bytes);
        self.change(id, |committed| committed - bytes);
        self.committed_bytes -= bytes;
        if self
            .accounts
            .get(&id)
            .is_some_and(|account| account.closed && account.committed_bytes == 0)
        {
            self.accounts.remove(&id);
        }
    }

    /// What an account may hold; nothing where there is none.
    pub(crate) fn quota(&self, id: AccountId) -> Quota {
        let account = self.accounts.get(&id);
        account.map_or(Quota::NOTHING, |account| account.quota)
    }

    /// What is charged to an account, in bytes.
    pub(crate) fn account_bytes(&self, id: AccountId) -> usize {
        self.accounts
            .get(&id)
            .map_or(0, |account| account.committed_bytes)
    }

    fn change(&mut self, id: AccountId, change: impl FnOnce(usize) -> usize) {
        if let Some(account) = self.accounts.get_mut(&id) {
            self.unused_guarantee_bytes -= account.unused_guarantee();
            account.committed_bytes = change(account.committed_bytes);
            self.unused_guarantee_bytes += account.unused_guarantee();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_refusal_says_what_there_was() {
        let mut ledger = Ledger::new(100);
        let quota = |guarantee_bytes| Quota {
            guarantee_bytes,
            ..Quota::default()
        };
        let first = ledger.open(quota(30)).expect("fits");
        let second = ledger.open(quota(0)).expect("fits");
        assert_eq!(
            ledger.charge(second, 71),
            Err(Refusal {
                free_bytes: 70,
                below_ceiling_bytes: usize::MAX,
                limit_bytes: 70
            })
        );
        assert_eq!(ledger.charge(second, 70), Ok(()));
        assert_eq!(ledger.charge(first, 30), Ok(()));
        assert!(ledger.charge(first, 1).is_err());
        assert_eq!(
            ledger.open(quota(1)),
            Err(VmmError::QuotaUnsatisfiable {
                what: "guarantee",
                asked_bytes: 1,
                available_bytes: 0
            })
        );
    }

    #[test]
    fn a_ceiling_below_the_guarantee_is_refused() {
        let quota = Quota {
            guarantee_bytes: 2,
            ceiling_bytes: 1,
        };
        assert_eq!(
            Ledger::new(100).open(quota),
            Err(VmmError::QuotaUnsatisfiable {
                what: "guarantee above its ceiling",
                asked_bytes: 2,
                available_bytes: 1
            })
        );
    }

    #[test]
    fn a_closed_account_keeps_its_charge_until_it_is_refunded() {
        let mut ledger = Ledger::new(100);
        let id = ledger.open(Quota::default()).expect("fits");
        assert_eq!(ledger.charge(id, 60), Ok(()));
        ledger.close(id);
        assert_eq!(ledger.committed_bytes(), 60);
        assert!(
            ledger.charge(id, 1).is_err(),
            "closed accounts grow no more"
        );
        ledger.refund(id, 60);
        assert_eq!(ledger.committed_bytes(), 0);
        assert!(ledger.accounts.is_empty());
    }

    #[test]
    fn an_account_with_a_ceiling_of_zero_stays_open_when_nothing_is_refunded() {
        let mut ledger = Ledger::new(100);
        let quota = Quota {
            guarantee_bytes: 0,
            ceiling_bytes: 0,
        };
        let id = ledger.open(quota).expect("fits");
        ledger.refund(id, 0);
        assert_eq!(ledger.charge(id, 0), Ok(()));
        assert_eq!(
            ledger.charge(id, 1).map_err(|refusal| refusal.limit_bytes),
            Err(0)
        );
    }

    proptest! {
        #[test]
        fn a_guarantee_always_holds_and_the_limit_is_never_passed(
            quotas in prop::collection::vec((0..60usize, 0..120usize), 1..6),
            steps in prop::collection::vec((0..6usize, 0..80usize, any::<bool>()), 0..200),
        ) {
            let mut ledger = Ledger::new(100);
            let mut accounts = Vec::new();
            for (guarantee_bytes, above) in quotas {
                let quota = Quota { guarantee_bytes, ceiling_bytes: guarantee_bytes + above };
                if let Ok(id) = ledger.open(quota) {
                    accounts.push((id, quota, 0));
                }
            }
            for (who, bytes, take) in steps {
                let count = accounts.len().max(1);
                let Some((id, quota, held)) = accounts.get_mut(who % count) else { continue };
                if take {
                    let outcome = ledger.charge(*id, bytes);
                    if *held + bytes <= quota.guarantee_bytes {
                        prop_assert_eq!(outcome, Ok(()), "within the guarantee");
                    }
                    prop_assert!(outcome.is_err() || *held + bytes <= quota.ceiling_bytes);
                    if let Err(refusal) = outcome {
                        prop_assert!(refusal.free_bytes < bytes);
                        prop_assert!(refusal.free_bytes == 0 || ledger.charge(*id, refusal.free_bytes).is_ok());
                        *held += refusal.free_bytes;
                    } else {
                        *held += bytes;
                    }
                } else {
                    let bytes = bytes.min(*held);
                    ledger.refund(*id, bytes);
                    *held -= bytes;
                }
                let total: usize = accounts.iter().map(|(_, _, held)| held).sum();
                prop_assert_eq!(ledger.committed_bytes(), total);
                let owed: usize = accounts.iter().map(|(_, quota, held)| quota.guarantee_bytes.saturating_sub(*held)).sum();
                prop_assert!(total + owed <= 100);
            }
        }
    }
}
