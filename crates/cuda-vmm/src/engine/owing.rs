//! What each range owes of what is wanted, and what it may still take.

use super::books::ledger::{AccountId, Refusal};
use super::books::range_id::RangeId;
use super::owed::Owed;
use super::range::Range;
use super::state::State;
use crate::VmmError;
use crate::sync::Arc;
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
        for (account, bytes) in &self.releasing {
            if let Some(account) = account {
                *coming.entry(*account).or_default() += bytes;
            }
        }
        coming
    }

    /// Works out anew what each range owes, if any may owe anything. Returns those that owe more
    /// than before, to be woken when the lock is released.
    ///
    /// `is_pressing` says whether any range owed anything when that was last worked out. It is set
    /// before this inspects the ranges. A thread that takes or frees memory under a range's lock
    /// alone reads it after taking that lock, so one of the two sees the other.
    pub(crate) fn share_out(&mut self, is_pressing: &AtomicBool) -> Vec<Arc<Owed>> {
        if self.ledger.is_calm() && !is_pressing.load(Ordering::SeqCst) {
            return Vec::new();
        }
        is_pressing.store(true, Ordering::SeqCst);
        let coming = self.coming();
        let come = |account| coming.get(&account).copied().unwrap_or_default();
        let owed = self.ledger.owed(come);
        is_pressing.store(!self.ledger.is_calm(), Ordering::SeqCst);
        let ranges = self.ranges.values();
        ranges
            .filter_map(|range| {
                let bytes = owed.get(&range.account).copied().unwrap_or_default();
                range.owed.set(bytes).then(|| range.owed.clone())
            })
            .collect()
    }

    /// Whether a range holds more than it may, and what it may take then; see
    /// `Ledger::room_below_ceiling`.
    pub(crate) fn room_below_ceiling(&self, range: &Range) -> Option<Refusal> {
        self.ledger.room_below_ceiling(range.account, || {
            let releasing = self.releasing.iter();
            let releasing = releasing.filter(|(account, _)| *account == Some(range.account));
            let releasing_bytes: usize = releasing.map(|(_, bytes)| bytes).sum();
            range.coming_bytes() + releasing_bytes
        })
    }

    /// A range that holds more than it may, and some of it to spare.
    pub(crate) fn spare_above_ceiling(&self) -> Option<RangeId> {
        if self.ledger.is_calm() {
            return None;
        }
        let mut ranges = self.ranges.iter();
        let found = ranges.find(|(_, range)| {
            self.ledger.is_above_ceiling(range.account)
                && range.spare_parked_bytes() + range.pages.parts().ahead_bytes > 0
        });
        found.map(|(id, _)| id)
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
