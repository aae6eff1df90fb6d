//! The ranges of an engine, each behind a lock of its own.
//!
//! A thread takes the engine's lock first and then one range's, and never two ranges' at a time. A
//! thread that makes or gives back memory holds the engine's. What is there already is taken and
//! freed under the range's lock alone, so models that do so write to no cache line in common.

use super::books::account::AccountId;
use super::books::range_id::RangeId;
use super::range::{Range, Remains};
use super::scope::Scope;
use super::slot::Slot;
use crate::process::Process;
use crate::sync::MutexGuard;
use core::cell::Cell;
use core::ops::{Deref, DerefMut};
use std::collections::BTreeMap;

/// A range that was locked through the engine's state. Each mutable access is a change, which the
/// engine's guard tells.
#[derive(Debug)]
pub(crate) struct RangeGuard<'a> {
    range: MutexGuard<'a, Range>,
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
    /// Whether a range was changed since the engine was locked.
    is_changed: Cell<bool>,
}

impl Ranges {
    pub(crate) fn insert(&mut self, range: Range, process: Process) -> Slot {
        let id = RangeId(self.next);
        self.next += 1;
        let slot = Slot::new(id, process, range);
        self.by_id.insert(id, slot.clone());
        slot
    }

    /// Takes out a range that holds no memory any more. What is left of it is to be dropped without
    /// a lock: that calls the driver.
    pub(crate) fn remove(&mut self, id: RangeId) -> Option<Remains> {
        let slot = self.by_id.remove(&id)?;
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

    /// The ranges that are charged to an account.
    pub(crate) fn of_account(&self, account: AccountId) -> impl Iterator<Item = &Slot> {
        let slots = self.by_id.values();
        slots.filter(move |slot| slot.account() == account)
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

    /// The ranges that a call with this scope looks at, each locked in its turn.
    pub(crate) fn within(&self, scope: Scope) -> impl Iterator<Item = (RangeId, RangeGuard<'_>)> {
        let ranges = self.by_id.iter();
        let ranges = ranges.filter(move |(id, _)| self.covers(scope, **id));
        ranges.map(|(id, slot)| (*id, self.guard(slot)))
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

    /// The ranges for which a step has something to do.
    pub(crate) fn with_work(&self) -> impl Iterator<Item = &Slot> {
        self.by_id.values().filter(|slot| slot.has_work())
    }

    /// Locks one range after the other, in the order in which they were made.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (RangeId, RangeGuard<'_>)> {
        let ranges = self.by_id.iter();
        ranges.map(|(id, slot)| (*id, self.guard(slot)))
    }

    /// As [`iter`](Self::iter), without the names.
    pub(crate) fn values(&self) -> impl Iterator<Item = RangeGuard<'_>> {
        self.by_id.values().map(|slot| self.guard(slot))
    }
}
