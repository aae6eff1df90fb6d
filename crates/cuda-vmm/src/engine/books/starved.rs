//! Ranges that wanted memory ahead when the budget had no room for it.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::range_id::RangeId;
use std::collections::BTreeMap;

/// What was refused since ranges were last told of room.
#[derive(Debug, Default)]
pub(crate) struct Starved {
    /// What each of them wanted next, in bytes.
    wanted: BTreeMap<RangeId, usize>,
    /// The same, of all together.
    wanted_bytes: usize,
    /// What was committed at the last refusal.
    committed_bytes: usize,
    /// Ranges for which there may be room, and which have not been taken out yet.
    told: Vec<RangeId>,
}

impl Starved {
    /// Notes that a range was refused so many bytes while as many were committed.
    pub(crate) fn refuse(&mut self, id: RangeId, bytes: usize, committed_bytes: usize) {
        self.forget(id);
        self.committed_bytes = committed_bytes;
        self.wanted.insert(id, bytes);
        self.wanted_bytes += bytes;
    }

    /// Forgets a range that wants nothing any more.
    pub(crate) fn forget(&mut self, id: RangeId) {
        self.wanted_bytes -= self.wanted.remove(&id).unwrap_or_default();
    }

    /// A limit, a quota or an account has changed: there may be room though as much is committed.
    pub(crate) fn note_other_room(&mut self) {
        self.committed_bytes = usize::MAX;
    }

    /// Whether there may be room, with so many bytes committed. For all of the ranges, as what is
    /// made ahead for one would be in the way of the next allocation.
    pub(crate) fn has_room(&self, committed_bytes: usize) -> bool {
        let then_bytes = committed_bytes.saturating_add(self.wanted_bytes);
        !self.wanted.is_empty() && then_bytes <= self.committed_bytes
    }

    /// Takes out ranges for which there may be room, at most so many.
    pub(crate) fn take(&mut self, committed_bytes: usize, at_most: usize) -> Vec<RangeId> {
        if self.has_room(committed_bytes) {
            self.wanted_bytes = 0;
            self.told
                .extend(core::mem::take(&mut self.wanted).into_keys());
        }
        self.told.split_off(self.told.len().saturating_sub(at_most))
    }

    /// Whether more ranges can be taken out at once.
    pub(crate) fn is_any_told(&self) -> bool {
        !self.told.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_room_when_all_of_them_would_fit() {
        let mut starved = Starved::default();
        assert!(!starved.has_room(0), "nobody was refused");
        for (id, committed_bytes) in [(1, 90), (2, 80), (1, 80)] {
            starved.refuse(RangeId(id), 10, committed_bytes);
        }
        assert_eq!(starved.take(61, 9), []);
        assert_eq!(starved.take(60, 9), [RangeId(1), RangeId(2)]);
        assert_eq!(starved.take(0, 9), [], "they were told");
        starved.refuse(RangeId(3), 10, 50);
        starved.note_other_room();
        assert_eq!(starved.take(50, 9), [RangeId(3)]);
        starved.note_other_room();
        assert!(!starved.has_room(0));
    }

    #[test]
    fn they_are_taken_out_some_at_a_time_and_those_that_are_closed_are_not_waited_for() {
        let mut starved = Starved::default();
        (0..5).for_each(|id| starved.refuse(RangeId(id), 10, 100));
        starved.forget(RangeId(4));
        starved.forget(RangeId(4));
        assert_eq!(starved.take(61, 3), []);
        assert!(!starved.is_any_told());
        let mut taken = starved.take(60, 3);
        assert!(starved.is_any_told());
        assert_eq!(taken.len(), 3);
        // Whatever is committed now, they were told.
        taken.extend(starved.take(100, 3));
        taken.sort_unstable();
        assert_eq!(taken, [0, 1, 2, 3].map(RangeId));
        assert!(!starved.is_any_told());
    }
}
