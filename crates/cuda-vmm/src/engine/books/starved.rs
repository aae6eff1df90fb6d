//! Ranges that wanted memory ahead when the budget had no room for it.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::range_id::RangeId;

/// What was refused since ranges were last told of room.
#[derive(Debug, Default)]
pub(crate) struct Starved {
    ranges: Vec<RangeId>,
    /// What they wanted next.
    wanted_bytes: usize,
    /// What was committed at the last refusal.
    committed_bytes: usize,
}

impl Starved {
    /// Notes that a range was refused so many bytes while as many were committed.
    pub(crate) fn refuse(&mut self, id: RangeId, bytes: usize, committed_bytes: usize) {
        self.committed_bytes = committed_bytes;
        if !self.ranges.contains(&id) {
            self.ranges.push(id);
            self.wanted_bytes = self.wanted_bytes.saturating_add(bytes);
        }
    }

    /// A limit, a quota or an account has changed: there may be room though as much is committed.
    pub(crate) fn note_other_room(&mut self) {
        self.committed_bytes = usize::MAX;
    }

    /// Whether there may be room, with so many bytes committed. For all of the ranges, as what is
    /// made ahead for one would be in the way of the next allocation.
    pub(crate) fn has_room(&self, committed_bytes: usize) -> bool {
        let then_bytes = committed_bytes.saturating_add(self.wanted_bytes);
        !self.ranges.is_empty() && then_bytes <= self.committed_bytes
    }

    /// Takes out all ranges if there may be room for them.
    pub(crate) fn take(&mut self, committed_bytes: usize) -> Vec<RangeId> {
        match self.has_room(committed_bytes) {
            true => core::mem::take(self).ranges,
            false => Vec::new(),
        }
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
        assert_eq!(starved.take(61), []);
        assert_eq!(starved.take(60), [RangeId(1), RangeId(2)]);
        assert_eq!(starved.take(0), [], "they were told");
        starved.refuse(RangeId(3), 10, 50);
        starved.note_other_room();
        assert_eq!(starved.take(50), [RangeId(3)]);
        starved.note_other_room();
        assert!(!starved.has_room(0));
    }
}
