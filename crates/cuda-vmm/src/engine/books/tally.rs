//! What an engine knows of its ranges without locking them: a look at each, and the sums.
//!
//! An engine may have ten thousand ranges, and most of its work is about one. So no sum is worked
//! out by a walk: a range that was changed is looked at again, and the sums follow.

use super::account::AccountId;
use super::comes_back::ComesBack;
use super::range_id::RangeId;
use crate::MemoryParts;
use core::ops::Bound;
use std::collections::{BTreeMap, BTreeSet};

/// Something that an engine looks for among its ranges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fact {
    /// Some of it was freed under its own lock, and is not in the engine's queue yet.
    Freed,
    /// Some of it was freed, and waits for leases to end.
    WaitsForLeases,
    /// It is closed.
    Closed,
    /// It is closed, and nothing backs it any more.
    Ended,
    /// It is closed, and only what the device or the driver has to do keeps it.
    Ending,
    /// It has parked chunks that may be unmapped.
    Parked,
    /// The same, and it keeps nothing that it has freed, and no thread is closing it.
    ParkedAndLeft,
    /// It has chunks made ahead.
    Ahead,
    /// It has a chunk made ahead at a place that allocations have left.
    StaleAhead,
    /// It wants memory made ahead.
    Hungry,
    /// The driver would not take some of it back.
    Quarantined,
    /// Work of any stream of any device may use it.
    UsedByAll,
    /// It has mappings of shared chunks that are only to be unmapped.
    Leaving,
}

impl Fact {
    const ALL: [Self; 13] = [
        Self::Freed,
        Self::WaitsForLeases,
        Self::Closed,
        Self::Ended,
        Self::Ending,
        Self::Parked,
        Self::ParkedAndLeft,
        Self::Ahead,
        Self::StaleAhead,
        Self::Hungry,
        Self::Quarantined,
        Self::UsedByAll,
        Self::Leaving,
    ];
}

/// The facts that hold of a range.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Facts(u16);

impl Facts {
    pub(crate) fn has(self, fact: Fact) -> bool {
        self.0 & (1 << fact as u16) != 0
    }
}

impl FromIterator<(Fact, bool)> for Facts {
    fn from_iter<I: IntoIterator<Item = (Fact, bool)>>(facts: I) -> Self {
        let bits = facts.into_iter();
        Self(bits.fold(0, |bits, (fact, holds)| {
            bits | u16::from(holds) << fact as u16
        }))
    }
}

/// What one range was when it was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RangeLook {
    pub(crate) account: AccountId,
    pub(crate) parts: MemoryParts,
    /// What is parked and may be unmapped, in bytes.
    pub(crate) spare_parked_bytes: usize,
    /// The same, unless a thread is closing the range.
    pub(crate) left_parked_bytes: usize,
    pub(crate) facts: Facts,
}

impl RangeLook {
    fn comes_back(&self) -> ComesBack {
        let spare_bytes = self.parts.ahead_bytes + self.spare_parked_bytes;
        ComesBack {
            coming_bytes: self.parts.retiring_bytes + spare_bytes,
            spare_bytes,
        }
    }
}

/// A look at each range of an engine, and the sums over them.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    looks: BTreeMap<RangeId, RangeLook>,
    by_account: BTreeSet<(AccountId, RangeId)>,
    accounts: BTreeMap<AccountId, ComesBack>,
    parts: MemoryParts,
    spare_parked_bytes: usize,
    left_parked_bytes: usize,
    with: [BTreeSet<RangeId>; Fact::ALL.len()],
}

impl Tally {
    /// Notes what a range is now; returns its account and what comes back of that, if this changed.
    pub(crate) fn set(&mut self, id: RangeId, look: RangeLook) -> Option<(AccountId, ComesBack)> {
        self.replace(id, Some(look))
    }

    /// Forgets a range; returns as [`set`](Self::set).
    pub(crate) fn remove(&mut self, id: RangeId) -> Option<(AccountId, ComesBack)> {
        self.replace(id, None)
    }

    fn replace(&mut self, id: RangeId, look: Option<RangeLook>) -> Option<(AccountId, ComesBack)> {
        let before = match look {
            Some(look) => self.looks.insert(id, look),
            None => self.looks.remove(&id),
        };
        let account = look.or(before)?.account;
        match (before, look) {
            (None, Some(_)) => _ = self.by_account.insert((account, id)),
            (Some(_), None) => _ = self.by_account.remove(&(account, id)),
            _ => {}
        }
        let part = |bytes: fn(&RangeLook) -> usize| {
            let bytes = |look: &Option<RangeLook>| look.as_ref().map_or(0, bytes);
            (bytes(&before), bytes(&look))
        };
        let (old, new) = part(|look| look.spare_parked_bytes);
        self.spare_parked_bytes = self.spare_parked_bytes - old + new;
        let (old, new) = part(|look| look.left_parked_bytes);
        self.left_parked_bytes = self.left_parked_bytes - old + new;
        let parts = |look: &Option<RangeLook>| look.map_or(MemoryParts::default(), |it| it.parts);
        self.parts = self.parts - parts(&before) + parts(&look);
        let facts = |look: &Option<RangeLook>| look.map_or(Facts::default(), |look| look.facts);
        let (old, new) = (facts(&before), facts(&look));
        for fact in Fact::ALL.into_iter().filter(|_| old != new) {
            match (old.has(fact), new.has(fact)) {
                (false, true) => _ = self.with[fact as usize].insert(id),
                (true, false) => _ = self.with[fact as usize].remove(&id),
                _ => {}
            }
        }
        let comes_back =
            |look: Option<RangeLook>| look.map_or(ComesBack::default(), |look| look.comes_back());
        let (old, new) = (comes_back(before), comes_back(look));
        let sum = self.accounts.entry(account).or_default();
        sum.coming_bytes = sum.coming_bytes - old.coming_bytes + new.coming_bytes;
        sum.spare_bytes = sum.spare_bytes - old.spare_bytes + new.spare_bytes;
        let sum = *sum;
        if sum == ComesBack::default() {
            self.accounts.remove(&account);
        }
        (old != new).then_some((account, sum))
    }

    /// The ranges of which a fact holds, in the order in which they were made.
    pub(crate) fn with(&self, fact: Fact) -> impl Iterator<Item = RangeId> + '_ {
        self.with[fact as usize].iter().copied()
    }

    /// The same, those first that were made after this one.
    pub(crate) fn with_in_turn(
        &self,
        fact: Fact,
        last: RangeId,
    ) -> impl Iterator<Item = RangeId> + '_ {
        let with = &self.with[fact as usize];
        let after = with.range((Bound::Excluded(last), Bound::Unbounded));
        after.chain(with.range(..=last)).copied()
    }

    /// Whether a fact holds of any range.
    pub(crate) fn any(&self, fact: Fact) -> bool {
        !self.with[fact as usize].is_empty()
    }

    /// The ranges of an account, in the order in which they were made.
    pub(crate) fn of_account(&self, account: AccountId) -> impl Iterator<Item = RangeId> + '_ {
        let of_account = self.by_account.range((account, RangeId(0))..);
        let of_account = of_account.take_while(move |(of, _)| *of == account);
        of_account.map(|(_, id)| *id)
    }

    /// What one range was.
    pub(crate) fn of_range(&self, id: RangeId) -> Option<&RangeLook> {
        self.looks.get(&id)
    }

    /// What comes back of an account.
    pub(crate) fn comes_back(&self, account: AccountId) -> ComesBack {
        self.accounts.get(&account).copied().unwrap_or_default()
    }

    /// What all ranges are, in bytes.
    pub(crate) fn parts(&self) -> MemoryParts {
        self.parts
    }

    /// What is parked and may be unmapped, in bytes.
    pub(crate) fn spare_parked_bytes(&self) -> usize {
        self.spare_parked_bytes
    }

    /// The same of ranges that no thread is closing, in bytes.
    pub(crate) fn left_parked_bytes(&self) -> usize {
        self.left_parked_bytes
    }
}

#[cfg(test)]
mod tests;
