//! What a range owes, where its owner can see it without a lock, and whom to wake when it comes to owe more.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::books::ledger::{Ledger, Refusal};
use super::range::Range;
use super::{Handle, Inner, RangeId, State};
use crate::foreign::{self, Foreign};
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::sync::{Arc, Mutex, PoisonError};
use crate::{QuotaConflict, Result, VmmError};
use core::task::Waker;
use std::collections::BTreeMap;

/// What one range owes.
#[derive(Debug, Default)]
pub(crate) struct Owed {
    bytes: AtomicUsize,
    /// Shared, so that the owner's code that clones it is never called with a lock held.
    waker: Mutex<Option<Arc<Foreign<Waker>>>>,
}

impl Owed {
    /// What is owed now, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::SeqCst)
    }

    /// Notes what is owed now; says whether it is more than before.
    fn set(&self, bytes: usize) -> bool {
        self.bytes.swap(bytes, Ordering::SeqCst) < bytes
    }

    /// Says whom to wake from now on. What was there before is dropped here, without the lock.
    pub(crate) fn set_waker(&self, waker: Option<Waker>) {
        let waker = waker.map(|waker| Arc::new(Foreign::new(waker)));
        let mut held = self.waker.lock().unwrap_or_else(PoisonError::into_inner);
        let before = core::mem::replace(&mut *held, waker);
        drop(held);
        drop(before);
    }

    fn wake(&self) {
        let held = self.waker.lock().unwrap_or_else(PoisonError::into_inner);
        let waker = held.clone();
        drop(held);
        // Dropped here, without the lock: this may be the last that holds it.
        if let Some(waker) = waker
            && foreign::call(|| waker.wake_by_ref()).is_none()
        {
            crate::events::warn!("a waker panicked");
        }
    }
}

/// Tells the owners of ranges that they owe more. The caller holds no lock.
pub(super) fn wake(owing: Vec<Arc<Owed>>) {
    owing.iter().for_each(|owed| owed.wake());
}

impl State {
    /// What comes back of each account without its owner's doing, in bytes: what retires, and what is given up for who
    /// asks.
    fn coming(&self) -> BTreeMap<super::AccountId, usize> {
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

    /// Works out anew what each range owes, where anyone may owe anything; returns those that owe more than before, to
    /// be told when the lock is let go.
    ///
    /// `is_pressing` says whether anyone owed anything when that was last worked out, and is set before ranges are looked at:
    /// who takes or frees memory under a range's lock alone sees it, or is seen.
    pub(super) fn share_out(&mut self, is_pressing: &AtomicBool) -> Vec<Arc<Owed>> {
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

    /// Whether a range holds more than it may, and what it may take then; see [`Ledger::room_below_ceiling`].
    pub(super) fn room_below_ceiling(&self, range: &Range) -> Option<Refusal> {
        self.ledger.room_below_ceiling(range.account, || {
            let releasing = self.releasing.iter();
            let releasing = releasing.filter(|(account, _)| *account == Some(range.account));
            let releasing_bytes: usize = releasing.map(|(_, bytes)| bytes).sum();
            range.coming_bytes() + releasing_bytes
        })
    }

    /// A range that holds more than it may, and some of it to spare.
    pub(super) fn spare_above_ceiling(&self) -> Option<RangeId> {
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
}

impl Range {
    /// What comes back of it without its owner's doing, in bytes, but for what is being released.
    fn coming_bytes(&self) -> usize {
        let parts = self.pages.parts();
        parts.retiring_bytes + parts.ahead_bytes + self.spare_parked_bytes()
    }

    /// Whether its owner is asked for memory.
    pub(super) fn owes(&self) -> bool {
        self.owed.bytes() > 0
    }
}

impl Inner {
    /// What a range owes.
    pub(crate) fn owed(&self, handle: &Handle) -> Result<Arc<Owed>> {
        self.with_range(handle, |range| range.owed.clone())
    }

    /// Gives back to the driver what a range holds and does not use; returns the bytes. Waits for nothing.
    pub(crate) fn give_back_own(self: &Arc<Self>, handle: &Handle) -> Result<usize> {
        self.with_range(handle, |_| ())?;
        self.poll();
        let (bytes, outcome) = self.give_up(Some(handle.id()), |_| false);
        // Also if nothing went: what is owed is worked out anew.
        self.lock().note_change();
        outcome.map(|()| bytes)
    }

    /// Changes what a range may hold.
    pub(crate) fn set_quota(self: &Arc<Self>, handle: &Handle, quota: super::Quota) -> Result<()> {
        let account = self.with_range(handle, |range| range.account)?;
        self.make_room_for(|ledger| ledger.set_quota(account, quota))?;
        // What it has to spare above its ceiling goes with the next step.
        self.worker.wake(self, false);
        Ok(())
    }

    /// Has the ledger give a guarantee; what can be spared is given up for it, if that is what is missing.
    pub(super) fn make_room_for<T>(
        self: &Arc<Self>,
        guarantee: impl Fn(&mut Ledger) -> Result<T>,
    ) -> Result<T> {
        let mut polled = false;
        // Why the driver would not take back what was given up for this.
        let mut refused = None;
        loop {
            let mut state = self.lock();
            let outcome = guarantee(&mut state.ledger);
            let Err(VmmError::QuotaUnsatisfiable {
                what: QuotaConflict::Guarantee,
                asked_bytes,
                available_bytes,
            }) = outcome
            else {
                return outcome;
            };
            if !polled {
                polled = true;
                drop(state);
                self.poll();
                continue;
            }
            let spare_bytes = state.spare_parked_bytes() + state.parts().ahead_bytes;
            if asked_bytes - available_bytes > spare_bytes {
                return refused.map_or(outcome, Err);
            }
            match self.give_up_one(state, None) {
                Some(Err(error)) => refused = Some(error),
                Some(Ok(_)) => {}
                None => return refused.map_or(outcome, Err),
            }
        }
    }

    /// What a range may hold.
    pub(crate) fn quota(&self, handle: &Handle) -> Result<super::Quota> {
        let account = self.with_range(handle, |range| range.account)?;
        self.lock().ledger.quota(account).ok_or(VmmError::Closed)
    }
}
