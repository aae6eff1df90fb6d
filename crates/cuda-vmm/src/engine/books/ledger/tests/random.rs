//! Random operations on a ledger, against a plain model.

use super::{quota, *};
use proptest::prelude::*;
use std::collections::BTreeMap;

#[derive(Debug, Clone)]
enum Step {
    Take {
        which: usize,
        bytes: usize,
        in_line: bool,
    },
    Give {
        which: usize,
        bytes: usize,
        to_cache: bool,
    },
    SetQuota {
        which: usize,
        quota: Quota,
    },
    SetLimit {
        bytes: usize,
    },
    Refuse {
        which: usize,
        range: u64,
        bytes: usize,
    },
    /// A range gets what it was refused.
    Forget {
        which: usize,
        range: u64,
    },
    Withdraw {
        which: usize,
    },
    LeaveLine,
    /// What it holds stays charged until [`Step::Refund`].
    Close {
        which: usize,
    },
    Refund,
}

fn quotas() -> impl Strategy<Value = Quota> {
    (0..60usize, 0..120usize, -2..3i32)
        .prop_map(|(guarantee, above, priority)| quota(guarantee, guarantee + above, priority))
}

fn steps() -> impl Strategy<Value = Step> {
    let which = || 0..6usize;
    let any_quota = (0..60usize, 0..120usize, -2..3i32).prop_map(|(g, c, p)| quota(g, c, p));
    prop_oneof![
        5 => (which(), 0..80usize, any::<bool>())
            .prop_map(|(which, bytes, in_line)| Step::Take { which, bytes, in_line }),
        4 => (which(), 0..80usize, any::<bool>())
            .prop_map(|(which, bytes, to_cache)| Step::Give { which, bytes, to_cache }),
        2 => (which(), any_quota).prop_map(|(which, quota)| Step::SetQuota { which, quota }),
        2 => (0..150usize).prop_map(|bytes| Step::SetLimit { bytes }),
        2 => (which(), 0..3u64, 1..80usize)
            .prop_map(|(which, range, bytes)| Step::Refuse { which, range, bytes }),
        1 => (which(), 0..3u64).prop_map(|(which, range)| Step::Forget { which, range }),
        1 => which().prop_map(|which| Step::Withdraw { which }),
        1 => Just(Step::LeaveLine),
        1 => which().prop_map(|which| Step::Close { which }),
        1 => Just(Step::Refund),
    ]
}

/// What is known of an account.
#[derive(Debug, Clone)]
struct Plain {
    id: AccountId,
    quota: Quota,
    held: usize,
    /// What its ranges were refused and do not wait for, and in which step.
    refused: BTreeMap<u64, (usize, usize)>,
}

impl Plain {
    fn spoken_for(&self) -> usize {
        self.quota.guarantee_bytes.max(self.held)
    }

    fn below_ceiling(&self) -> usize {
        self.quota.most_bytes().saturating_sub(self.held)
    }
}

/// What is known of the ledger.
#[derive(Debug, Default)]
struct World {
    limit: usize,
    cached: usize,
    accounts: Vec<Plain>,
    /// What closed accounts still hold.
    closed: Vec<(AccountId, usize)>,
    line: Vec<(AccountId, Ticket)>,
}

impl World {
    fn total(&self) -> usize {
        let open: usize = self.accounts.iter().map(|account| account.held).sum();
        let closed: usize = self.closed.iter().map(|(_, held)| held).sum();
        open + closed
    }

    /// Held, or guaranteed and not held, by all accounts except the one at this index.
    fn spoken_for_by_others(&self, at: usize) -> usize {
        let others = self.accounts.iter().enumerate();
        let others = others.filter(|(index, _)| *index != at);
        let closed: usize = self.closed.iter().map(|(_, held)| held).sum();
        let open: usize = others.map(|(_, account)| account.spoken_for()).sum();
        open + closed
    }

    fn guaranteed(&self) -> usize {
        let accounts = self.accounts.iter();
        accounts.map(|account| account.quota.guarantee_bytes).sum()
    }

    fn is_over_limit(&self) -> bool {
        let spoken_for = self.spoken_for_by_others(usize::MAX);
        self.limit < spoken_for.max(self.total() + self.cached)
    }

    /// Compares what an account could be charged with what the ledger says.
    fn check_available(&self, ledger: &Ledger, at: usize) -> Result<(), TestCaseError> {
        let account = &self.accounts[at];
        let taken = self.spoken_for_by_others(at) + account.held;
        let in_budget = self.limit.saturating_sub(taken);
        let most = in_budget.min(account.below_ceiling());
        let sure = account.quota.guarantee_bytes.saturating_sub(account.held);
        let available = ledger.available_bytes(account.id, None, 0);
        if self.line.is_empty() {
            prop_assert_eq!(available, most);
        }
        prop_assert!(available <= most, "{} of {}", available, most);
        prop_assert!(
            available >= most.min(sure),
            "a guarantee waits behind no account"
        );
        Ok(())
    }

    /// Carries a step out on both.
    fn play(
        &mut self,
        ledger: &mut Ledger,
        number: usize,
        step: Step,
    ) -> Result<(), TestCaseError> {
        let count = self.accounts.len();
        let which = match step {
            Step::Take { which, .. } | Step::Give { which, .. } | Step::SetQuota { which, .. } => {
                which
            }
            Step::Refuse { which, .. } | Step::Forget { which, .. } => which,
            Step::Withdraw { which } | Step::Close { which } => which,
            Step::LeaveLine | Step::SetLimit { .. } | Step::Refund => 0,
        };
        if count == 0 {
            return Ok(());
        }
        let at = which % count;
        let others = self.spoken_for_by_others(at);
        let was_over = self.is_over_limit();
        let (limit, guaranteed) = (self.limit, self.guaranteed());
        let account = &mut self.accounts[at];
        let id = account.id;
        match step {
            Step::Take { bytes, in_line, .. } => {
                // The cache is given up before any account is refused.
                ledger.take_from_cache(core::mem::take(&mut self.cached));
                let available = ledger.available_bytes(id, None, 0);
                let outcome = ledger.charge(id, bytes, None);
                prop_assert_eq!(outcome.is_ok(), bytes <= available);
                if account.held + bytes <= account.quota.guarantee_bytes {
                    let is_sure = !was_over || others + account.held + bytes <= limit;
                    prop_assert!(
                        outcome.is_ok() || !is_sure,
                        "within the guarantee, whatever account waits"
                    );
                }
                if bytes > 0 {
                    prop_assert!(outcome.is_err() || bytes <= account.below_ceiling());
                    prop_assert!(outcome.is_err() || others + account.held + bytes <= limit);
                }
                match outcome {
                    Ok(()) => {
                        account.held += bytes;
                    }
                    Err(refusal) => {
                        prop_assert_eq!(refusal.free_bytes, available);
                        let ticket = in_line.then(|| ledger.line_up(of(id), bytes));
                        let free_bytes = ledger.room(id, ticket).free_bytes;
                        prop_assert!(free_bytes == refusal.free_bytes, "the last in the line");
                        match ticket {
                            Some(ticket) => {
                                self.line.push((id, ticket));
                                account.refused.remove(&0);
                            }
                            None => {
                                prop_assert_eq!(ledger.charge(id, free_bytes, None), Ok(()));
                                account.held += free_bytes;
                            }
                        }
                    }
                }
            }
            Step::Give {
                bytes, to_cache, ..
            } => {
                let bytes = bytes.min(account.held);
                account.held -= bytes;
                // What can be spared counts as if it were given back.
                let spare = |bytes| ComesBack {
                    coming_bytes: bytes,
                    spare_bytes: bytes,
                };
                let ids: Vec<_> = self.accounts.iter().map(|account| account.id).collect();
                ledger.foresee(id, spare(bytes));
                let foreseen: Vec<_> = ids
                    .iter()
                    .map(|id| ledger.available_bytes(*id, None, 0))
                    .collect();
                ledger.foresee(id, spare(0));
                if to_cache {
                    ledger.put_in_cache(id, bytes);
                    self.cached += bytes;
                } else {
                    ledger.refund(id, bytes);
                }
                if self.line.is_empty() {
                    let now = ids.iter().map(|id| ledger.available_bytes(*id, None, 0));
                    prop_assert_eq!(now.collect::<Vec<_>>(), foreseen);
                }
            }
            Step::SetQuota { quota: new, .. } => {
                let guarantee = account.quota.guarantee_bytes;
                let has_room = guaranteed - guarantee + new.guarantee_bytes <= limit
                    && new.guarantee_bytes
                        <= account.held + limit.saturating_sub(others + account.held);
                let keeps_no_more = new.guarantee_bytes <= guarantee;
                let holds = new.guarantee_bytes <= new.most_bytes() && (has_room || keeps_no_more);
                let outcome = ledger.set_quota(id, new);
                prop_assert_eq!(outcome.is_ok(), holds, "{:?}", outcome);
                if holds {
                    account.quota = new;
                }
                prop_assert_eq!(ledger.quota(id), Some(account.quota));
            }
            Step::SetLimit { bytes } => {
                let outcome = ledger.set_limit(bytes);
                let expected = VmmError::QuotaUnsatisfiable {
                    what: QuotaConflict::LimitBelowGuarantees,
                    asked_bytes: guaranteed,
                    available_bytes: bytes,
                };
                match guaranteed > bytes {
                    true => prop_assert_eq!(outcome, Err(expected)),
                    false => {
                        prop_assert_eq!(outcome, Ok(()));
                        self.limit = bytes;
                    }
                }
            }
            Step::Refuse { range, bytes, .. } => {
                ledger.refuse(owner(id, range), bytes, true);
                account.refused.insert(range, (bytes, number));
            }
            Step::Forget { range, .. } => {
                ledger.forget(owner(id, range));
                account.refused.remove(&range);
                prop_assert!(!ledger.is_refused(owner(id, range)));
            }
            Step::Withdraw { .. } => {
                let of_others = |ledger: &Ledger| -> Vec<_> {
                    ledger.refused().filter(|(of, _)| *of != id).collect()
                };
                let before = of_others(ledger);
                let mut refused = 0;
                for (range, (bytes, since)) in core::mem::take(&mut account.refused) {
                    if ledger.is_refused(owner(id, range)) {
                        refused += bytes;
                        continue;
                    }
                    // There was room for it often enough.
                    prop_assert!(number - since >= pressure::CHANCES as usize);
                }
                prop_assert_eq!(ledger.withdraw(id), refused);
                prop_assert_eq!(ledger.withdraw(id), 0, "once");
                prop_assert_eq!(of_others(ledger), before);
                prop_assert!(ledger.refused().all(|(of, _)| of != id));
            }
            Step::LeaveLine => {
                if let Some((_, ticket)) = self.line.pop() {
                    prop_assert!(ledger.leave_line(ticket));
                }
            }
            Step::Close { .. } => {
                ledger.close(id);
                ledger.refuse(of(id), 1, true);
                prop_assert!(ledger.refused().all(|(of, _)| of != id), "it is closed");
                prop_assert_eq!(ledger.available_bytes(id, None, 0), 0);
                prop_assert_eq!(ledger.quota(id), None);
                prop_assert_eq!(ledger.set_quota(id, quota(1, 2, 0)), Err(VmmError::Closed));
                let account = self.accounts.remove(at);
                if account.held > 0 {
                    self.closed.push((id, account.held));
                }
                self.line.retain(|(other, _)| *other != id);
            }
            Step::Refund => {
                if let Some((id, held)) = self.closed.pop() {
                    ledger.refund(id, held);
                }
            }
        }
        Ok(())
    }

    /// What holds after each step.
    fn check(&self, ledger: &mut Ledger) -> Result<(), TestCaseError> {
        prop_assert_eq!(ledger.committed_bytes(), self.total() + self.cached);
        prop_assert_eq!(ledger.is_over_limit(), self.is_over_limit());
        let is_above = |account: &&Plain| account.held > account.quota.most_bytes();
        let above = self.accounts.iter().filter(is_above).count();
        prop_assert_eq!(ledger.above_ceiling.len(), above);
        for at in 0..self.accounts.len() {
            self.check_available(ledger, at)?;
        }
        let owed = owed(ledger);
        prop_assert_eq!(owed.len(), self.accounts.len());
        let mut left = self.total();
        for account in &self.accounts {
            let (owes, held, quota) = (owed[&account.id], account.held, account.quota);
            prop_assert!(
                owes <= held.saturating_sub(quota.guarantee_bytes),
                "below a guarantee"
            );
            prop_assert!(owes >= held.saturating_sub(quota.most_bytes()));
            left -= owes;
        }
        // All that is owed brings it below the limit, unless closed accounts hold too much.
        let unused = self.accounts.iter().map(|account| {
            let left = account.held - owed[&account.id];
            account.quota.guarantee_bytes.saturating_sub(left)
        });
        let closed: usize = self.closed.iter().map(|(_, held)| held).sum();
        let guaranteed = self.guaranteed();
        prop_assert!(guaranteed <= self.limit);
        prop_assert!(left + unused.sum::<usize>() <= self.limit.max(closed + guaranteed));
        Ok(())
    }
}

proptest! {
    #[test]
    fn a_guarantee_always_holds_and_no_charge_passes_the_limit(
        quotas in prop::collection::vec(quotas(), 1..6),
        steps in prop::collection::vec(steps(), 0..200),
    ) {
        const LIMIT: usize = 100;
        let mut ledger = Ledger::new(LIMIT);
        let mut world = World { limit: LIMIT, ..World::default() };
        for quota in quotas {
            if let Ok(id) = ledger.open(quota) {
                world.accounts.push(Plain { id, quota, held: 0, refused: BTreeMap::new() });
            }
        }
        for (number, step) in steps.into_iter().enumerate() {
            let was_over = ledger.is_over_limit();
            let sets_limit = matches!(step, Step::SetLimit { .. });
            world.play(&mut ledger, number, step)?;
            prop_assert!(was_over || sets_limit || !ledger.is_over_limit());
            world.check(&mut ledger)?;
        }
    }
}
