//! What each account owes of what is wanted, what it may still take, and what it could give.

use super::books::account::AccountId;
use super::books::ledger::Refusal;
use super::books::pressure::Ticket;
use super::owed::Wakers;
use super::scope::Scope;
use super::state::State;
use super::stats::Givable;
use crate::VmmError;
use crate::sync::atomic::{AtomicBool, Ordering};
use std::collections::BTreeMap;

impl State {
    /// What comes back of each account without its owner's doing, in bytes: what retires, and what
    /// is given up if another account needs it.
    fn coming(&self) -> BTreeMap<AccountId, usize> {
        let mut coming = BTreeMap::new();
        for range in self.ranges.values() {
            *coming.entry(range.account).or_default() += range.coming_bytes();
        }
        for (owner, bytes) in &self.releasing {
            if let Some(owner) = owner {
                *coming.entry(owner.account).or_default() += bytes;
            }
        }
        coming
    }

    /// What is given up of each account if it is needed, in bytes.
    fn spare(&self) -> BTreeMap<AccountId, usize> {
        let mut spare = BTreeMap::new();
        for range in self.ranges.values() {
            *spare.entry(range.account).or_default() += range.spare_bytes();
        }
        spare
    }

    /// What an account could be charged now without waiting, in bytes, at this place in the line,
    /// or at its end.
    pub(crate) fn available_bytes(&self, id: AccountId, ticket: Option<Ticket>) -> usize {
        self.available_beside(id, ticket, &self.spare())
    }

    fn available_beside(
        &self,
        id: AccountId,
        ticket: Option<Ticket>,
        spare: &BTreeMap<AccountId, usize>,
    ) -> usize {
        let stuck_bytes = self.ledger.cached_bytes() - self.cache.bytes();
        let ledger = &self.ledger;
        ledger.available_bytes(id, ticket, of_each(spare), stuck_bytes)
    }

    /// What an account could give back now.
    pub(crate) fn givable(&self, id: AccountId) -> Givable {
        let mut givable = Givable::default();
        for (_, range) in self.ranges.within(Scope::Account(id)) {
            givable.trimmed_bytes += range.spare_bytes();
            givable.leased_bytes += range.parts().leased_bytes;
        }
        givable
    }

    /// Works out anew what each account owes, if any may owe anything. Returns the wakers of those
    /// that owe more than before, and of those for which there may be memory that they were
    /// refused: to be woken when the lock is released.
    ///
    /// `is_pressing` says whether any account owed anything when that was last worked out. It is
    /// set before this inspects the ranges. A thread that takes or frees memory under a range's
    /// lock alone reads it after taking that lock, so one of the two sees the other.
    pub(crate) fn share_out(&mut self, is_pressing: &AtomicBool) -> Wakers {
        let mut wakers = Wakers::default();
        if self.ledger.is_calm() && !is_pressing.load(Ordering::SeqCst) {
            return wakers;
        }
        is_pressing.store(true, Ordering::SeqCst);
        let spare = self.spare();
        let served: Vec<_> = self
            .ledger
            .refused()
            .filter(|(id, bytes)| *bytes <= self.available_beside(*id, None, &spare))
            .collect();
        let coming = self.coming();
        let owed = self.ledger.owed(of_each(&coming));
        is_pressing.store(!self.ledger.is_calm(), Ordering::SeqCst);
        for (id, entry) in self.accounts.iter() {
            let bytes = owed.get(&id).copied().unwrap_or_default();
            if entry.owed.set(bytes) {
                wakers.add(&entry.owed.more);
            }
            if served.iter().any(|(served, _)| *served == id) {
                wakers.add(&entry.owed.memory);
            }
        }
        wakers
    }

    /// Whether an account, or all of them, hold more than they may, and what it may take then; see
    /// `Ledger::room_when_over`. The caller has locked no range.
    pub(crate) fn room_when_over(&self, id: AccountId) -> Option<Refusal> {
        self.ledger.room_when_over(id, || {
            let coming = self.coming();
            move |of| coming.get(&of).copied().unwrap_or_default()
        })
    }

    /// What holds more than it may and has some of it to spare: an account above its ceiling, or
    /// all that is there if that is more than the limit.
    pub(crate) fn spare_when_over(&self) -> Option<Scope> {
        if self.ledger.is_calm() {
            return None;
        }
        if self.ledger.is_over_limit() {
            let mut ranges = self.ranges.values();
            let any = self.cache.bytes() > 0 || ranges.any(|range| range.spare_bytes() > 0);
            return any.then_some(Scope::All);
        }
        let mut ranges = self.ranges.iter();
        let found = ranges.find(|(_, range)| {
            self.ledger.is_above_ceiling(range.account) && range.spare_bytes() > 0
        });
        found.map(|(id, _)| Scope::Range(id))
    }

    /// The error of an allocation for which the budget has no room.
    pub(crate) fn out_of_memory(&self, asked_bytes: usize, room: &Refusal) -> VmmError {
        let stats = self.parts();
        VmmError::OutOfPhysicalMemory {
            asked_bytes,
            free_bytes: room.free_bytes,
            retiring_bytes: stats.retiring_bytes,
            reclaimable_bytes: stats.reclaimable_bytes(),
            limit_bytes: room.limit_bytes,
        }
    }
}

/// The number of an account, 0 if none is listed.
fn of_each(bytes: &BTreeMap<AccountId, usize>) -> impl Fn(AccountId) -> usize + '_ {
    |id| bytes.get(&id).copied().unwrap_or_default()
}
