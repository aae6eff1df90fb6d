//! What each account owes of what is wanted, what it may still take, and what it could give.

use super::books::account::AccountId;
use super::books::ledger::Refusal;
use super::books::pressure::Ticket;
use super::books::tally::Fact;
use super::owed::Wakers;
use super::scope::Scope;
use super::state::State;
use super::stats::Givable;
use crate::VmmError;
use crate::sync::atomic::{AtomicBool, Ordering};

impl State {
    /// Cached memory that cannot be used, in bytes: on its way to the driver, or refused by it.
    fn stuck_bytes(&self) -> usize {
        self.ledger.cached_bytes() - self.cache.bytes()
    }

    /// What an account could be charged now without waiting, in bytes, at this place in the line,
    /// or at its end. The caller has locked no range.
    pub(crate) fn available_bytes(&mut self, id: AccountId, ticket: Option<Ticket>) -> usize {
        self.look_again();
        let stuck_bytes = self.stuck_bytes();
        self.ledger.available_bytes(id, ticket, stuck_bytes)
    }

    /// What an account could give back now.
    pub(crate) fn givable(&mut self, id: AccountId) -> Givable {
        let tally = self.look_again();
        let ranges = tally.of_account(id).filter_map(|id| tally.of_range(id));
        Givable {
            trimmed_bytes: tally.comes_back(id).spare_bytes,
            leased_bytes: ranges.map(|range| range.parts.leased_bytes).sum(),
            ..Givable::default()
        }
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
        self.look_again();
        let served = self.ledger.served(self.stuck_bytes());
        let owed = self.ledger.owed();
        is_pressing.store(!self.ledger.is_calm(), Ordering::SeqCst);
        for id in served {
            if let Some(entry) = self.accounts.get(id) {
                wakers.add(&entry.owed.memory);
            }
        }
        // Those that owed something before and owe nothing now, too.
        let before = core::mem::replace(&mut self.owing, owed);
        for id in before.keys().filter(|id| !self.owing.contains_key(id)) {
            if let Some(entry) = self.accounts.get(*id) {
                entry.owed.set(0);
            }
        }
        for (id, bytes) in &self.owing {
            let entry = self.accounts.get(*id);
            if let Some(entry) = entry.filter(|entry| entry.owed.set(*bytes)) {
                wakers.add(&entry.owed.more);
            }
        }
        wakers
    }

    /// Whether an account, or all of them, hold more than they may, and what it may take then; see
    /// `Ledger::room_when_over`. The caller has locked no range.
    pub(crate) fn room_when_over(&mut self, id: AccountId) -> Option<Refusal> {
        if !self.ledger.is_over(id) {
            return None;
        }
        self.look_again();
        self.ledger.room_when_over(id)
    }

    /// What holds more than it may and has some of it to spare: an account above its ceiling, or
    /// all that is there if that is more than the limit.
    pub(crate) fn spare_when_over(&mut self) -> Option<Scope> {
        if self.ledger.is_calm() {
            return None;
        }
        self.look_again();
        if self.ledger.is_over_limit() {
            let tally = self.ranges.tally();
            let any = self.cache.bytes() > 0 || tally.any(Fact::Parked) || tally.any(Fact::Ahead);
            return any.then_some(Scope::All);
        }
        let spare = self.ledger.spare_above_ceiling();
        spare.map(Scope::Account)
    }

    /// The error of an allocation for which the budget has no room. The caller has locked no range.
    pub(crate) fn out_of_memory(&mut self, asked_bytes: usize, room: &Refusal) -> VmmError {
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
