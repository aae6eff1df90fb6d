//! The ranges of an engine, each behind a lock of its own.
//!
//! A thread takes the engine's lock first and then one range's, and never two ranges' at a time. A
//! thread that makes or gives back memory holds the engine's. What is there already is taken and
//! freed under the range's lock alone, so models that do so write to no cache line in common.

use super::books::account::AccountId;
use super::books::comes_back::ComesBack;
use super::books::range_id::RangeId;
use super::books::tally::{Fact, Tally};
use super::range::{Range, Remains};
use super::scope::Scope;
use super::slot::{Changed, RangeLock, Slot};
use crate::process::Process;
use crate::sync::Arc;
use core::cell::Cell;
use core::ops::{Deref, DerefMut};
use std::collections::BTreeMap;

/// A range that was locked through the engine's state. Each mutable access is a change, which the
/// engine's guard tells.
#[derive(Debug)]
pub(crate) struct RangeGuard<'a> {
    range: RangeLock<'a>,
    is_changed: &'a Cell<bool>,
}

impl RangeGuard<'_> {
    /// The range, for a change that can serve no other thread and changes nothing that is owed.
    pub(crate) fn quietly(&mut self) -> &mut Range {
        &mut self.range
    }
}

impl Deref for RangeGuard<'_> {
    type Target = Range;

    fn deref(&self) -> &Range {
        &self.range
    }
}

impl DerefMut for RangeGuard<'_> {
    fn deref_mut(&mut self) -> &mut Range {
        self.is_changed.set(true);
        &mut self.range
    }
}

/// The ranges that are open or still hold something, by name.
#[derive(Debug, Default)]
pub(crate) struct Ranges {
    by_id: BTreeMap<RangeId, Slot>,
    next: u64,
    /// Those that were changed since the last look.
    changed: Arc<Changed>,
    /// What they were at the last look.
    tally: Tally,
    /// Whether a range was changed since the engine was locked.
    is_changed: Cell<bool>,
}

impl Ranges {
    pub(crate) fn insert(&mut self, range: Range, process: Process) -> Slot {
        let id = RangeId(self.next);
        self.next += 1;
        let slot = Slot::new(id, process, range, &self.changed);
        self.by_id.insert(id, slot.clone());
        slot
    }

    /// Looks at the ranges that were changed since the last look. Tells what comes back of their
    /// accounts, if this has changed. The caller has locked no range.
    pub(crate) fn look_again(&mut self, mut tell: impl FnMut(AccountId, ComesBack)) {
        for id in self.changed.take() {
            if let Some(slot) = self.by_id.get(&id)
                && let Some((account, comes_back)) = self.tally.set(id, slot.look())
            {
                tell(account, comes_back);
            }
        }
    }

    /// What they were at the last look.
    pub(crate) fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Takes out a range that holds no memory any more. What is left of it is to be dropped without
    /// a lock: that calls the driver.
    pub(crate) fn remove(&mut self, id: RangeId) -> Option<Remains> {
        let slot = self.by_id.remove(&id)?;
        // Nothing of it comes back any more, as nothing of it is there.
        self.tally.remove(id);
        let remains = slot.lock().end();
        Some(remains)
    }

    pub(crate) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(crate) fn slot(&self, id: RangeId) -> Option<&Slot> {
        self.by_id.get(&id)
    }

    /// Locks one range.
    pub(crate) fn get(&self, id: RangeId) -> Option<RangeGuard<'_>> {
        self.by_id.get(&id).map(|slot| self.guard(slot))
    }

    /// The ranges that are charged to an account, and were there at the last look.
    pub(crate) fn of_account(&self, account: AccountId) -> impl Iterator<Item = &Slot> {
        let ids = self.tally.of_account(account);
        ids.filter_map(|id| self.by_id.get(&id))
    }

    /// Whether a call with this scope looks at the range.
    pub(crate) fn covers(&self, scope: Scope, id: RangeId) -> bool {
        match scope {
            Scope::All => true,
            Scope::Range(only) => only == id,
            Scope::Account(account) => {
                let slot = self.by_id.get(&id);
                slot.is_some_and(|slot| slot.account() == account)
            }
        }
    }

    /// The ranges of which a fact held at the last look, each locked in its turn. It may hold no
    /// more, if another thread has changed the range since.
    pub(crate) fn with(&self, fact: Fact) -> impl Iterator<Item = (RangeId, RangeGuard<'_>)> {
        let ids = self.tally.with(fact);
        ids.filter_map(|id| Some((id, self.get(id)?)))
    }

    /// The same, those first that were made after this one.
    pub(crate) fn with_in_turn(
        &self,
        fact: Fact,
        last: RangeId,
    ) -> impl Iterator<Item = (RangeId, RangeGuard<'_>)> {
        let ids = self.tally.with_in_turn(fact, last);
        ids.filter_map(|id| Some((id, self.get(id)?)))
    }

    /// The same, as far as a call with this scope looks at them.
    pub(crate) fn with_within(
        &self,
        fact: Fact,
        scope: Scope,
    ) -> impl Iterator<Item = (RangeId, RangeGuard<'_>)> {
        let (of_all, of_account, of_range) = match scope {
            Scope::All => (Some(self.tally.with(fact)), None, None),
            Scope::Account(account) => (None, Some(self.tally.of_account(account)), None),
            Scope::Range(id) => (None, None, Some(id)),
        };
        let of_all = of_all.into_iter().flatten();
        let ids = of_all
            .chain(of_account.into_iter().flatten())
            .chain(of_range);
        let has = move |id: &RangeId| {
            let look = self.tally.of_range(*id);
            look.is_some_and(|look| look.facts.has(fact))
        };
        ids.filter(has).filter_map(|id| Some((id, self.get(id)?)))
    }

    fn guard<'a>(&'a self, slot: &'a Slot) -> RangeGuard<'a> {
        RangeGuard {
            range: slot.lock(),
            is_changed: &self.is_changed,
        }
    }

    pub(crate) fn is_changed(&self) -> bool {
        self.is_changed.get()
    }

    /// Whether a range was changed since this was asked.
    pub(crate) fn take_changed(&mut self) -> bool {
        self.is_changed.take()
    }

    /// Locks one range after the other, in the order in which they were made.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (RangeId, RangeGuard<'_>)> {
        let ranges = self.by_id.iter();
        ranges.map(|(id, slot)| (*id, self.guard(slot)))
    }

    /// As [`iter`](Self::iter), without the names.
    pub(crate) fn values(&self) -> impl Iterator<Item = RangeGuard<'_>> {
        self.iter().map(|(_, range)| range)
    }
}
