//! A set of integers kept as merged intervals.

use super::sorted::{Position, SortedMap};
use core::ops::Range;

/// Merged, disjoint, non-empty intervals: neighbours that touch are one. Ends by their starts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Intervals(SortedMap<usize>);

/// The stored intervals before and after a range that is not in the set.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Around {
    pub(crate) before: Option<Range<usize>>,
    pub(crate) after: Option<Range<usize>>,
    /// The place of the one before, until the set changes.
    place: Option<Position>,
}

impl Intervals {
    fn stored(&self, place: Position) -> Range<usize> {
        let (start, end) = self.0.entry(place);
        start..*end
    }

    /// Where the stored interval is that holds `point`, or else the next one after it.
    fn place_at_or_after(&self, point: usize) -> Option<Position> {
        let before = self.0.at_or_before(point);
        before
            .filter(|place| self.stored(*place).end > point)
            .or_else(|| self.0.next(before))
    }

    /// The stored interval that holds `point`, or else the next one after it.
    fn at_or_after(&self, point: usize) -> Option<Range<usize>> {
        self.place_at_or_after(point)
            .map(|place| self.stored(place))
    }

    /// The stored interval that begins before `point` and after all others that do.
    fn before(&self, point: usize) -> Option<Position> {
        point
            .checked_sub(1)
            .and_then(|last| self.0.at_or_before(last))
    }

    /// The length of the stored interval that ends at `point`; 0 if none does.
    pub(crate) fn length_before(&self, point: usize) -> usize {
        let before = self.before(point).map(|place| self.stored(place));
        before
            .filter(|before| before.end == point)
            .map_or(0, |before| before.len())
    }

    /// Whether any point of `range` is in the set.
    pub(crate) fn overlaps(&self, range: &Range<usize>) -> bool {
        self.at_or_after(range.start)
            .is_some_and(|found| found.start < range.end)
    }

    /// Whether every point of `range` is in the set.
    pub(crate) fn contains(&self, range: &Range<usize>) -> bool {
        self.at_or_after(range.start)
            .is_some_and(|found| found.start <= range.start && found.end >= range.end)
    }

    /// What is next to a range; `None` if it overlaps the set.
    #[inline]
    pub(crate) fn around(&self, range: &Range<usize>) -> Option<Around> {
        let place = self.before(range.end);
        let before = place.map(|place| self.stored(place));
        if before
            .as_ref()
            .is_some_and(|before| before.end > range.start)
        {
            return None;
        }
        let after = self.0.next(place).map(|place| self.stored(place));
        Some(Around {
            before,
            after,
            place,
        })
    }

    /// Adds a non-empty range that does not overlap the set.
    pub(crate) fn insert(&mut self, range: Range<usize>) {
        if let Some(around) = self.around(&range) {
            self.insert_between(range, &around);
        }
    }

    /// Adds a non-empty range, of which is known what is around it.
    #[inline]
    pub(crate) fn insert_between(&mut self, range: Range<usize>, around: &Around) {
        debug_assert!(!range.is_empty() && self.around(&range).as_ref() == Some(around));
        let touched_before = around.before.as_ref().map(|before| before.end) == Some(range.start);
        let touched_before = around.place.filter(|_| touched_before);
        let touched_after = around
            .after
            .as_ref()
            .filter(|after| after.start == range.end);
        let next = touched_after.and_then(|_| self.0.next(around.place));
        match (touched_before, touched_after, next) {
            (Some(before), Some(after), Some(next)) => {
                *self.0.value_mut(before) = after.end;
                self.0.remove_at(next);
            }
            (Some(before), ..) => *self.0.value_mut(before) = range.end,
            (None, _, Some(next)) => self.0.rename(next, range.start),
            _ => self.0.insert_after(around.place, range.start, range.end),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes out a non-empty range that lies wholly in the set.
    pub(crate) fn remove(&mut self, range: &Range<usize>) {
        debug_assert!(!range.is_empty() && self.contains(range));
        let Some(place) = self.place_at_or_after(range.start) else {
            return;
        };
        let found = self.stored(place);
        match (found.start < range.start, range.end < found.end) {
            (false, false) => {
                self.0.remove_at(place);
            }
            (false, true) => self.0.rename(place, range.end),
            (true, false) => *self.0.value_mut(place) = range.start,
            (true, true) => {
                *self.0.value_mut(place) = range.start;
                self.0.insert_after(Some(place), range.end, found.end);
            }
        }
    }

    /// The parts of `within` that are not in the set, in order.
    pub(crate) fn gaps(&self, within: Range<usize>) -> impl Iterator<Item = Range<usize>> + '_ {
        let mut at = within.start;
        let first = self
            .at_or_after(within.start)
            .map_or(within.end, |found| found.start);
        let mut stored = self.0.range(first..usize::MAX);
        core::iter::from_fn(move || {
            while at < within.end {
                let (start, end) = stored
                    .next()
                    .map_or((within.end, usize::MAX), |(start, end)| (start, *end));
                let gap = at..start.min(within.end);
                at = end.min(within.end);
                if !gap.is_empty() {
                    return Some(gap);
                }
            }
            None
        })
    }

    /// How many points of `range` are in the set.
    pub(crate) fn within(&self, range: &Range<usize>) -> usize {
        let first = self.at_or_after(range.start);
        let first = first.map_or(range.end, |found| found.start);
        let stored = self.0.range(first..range.end);
        stored
            .map(|(start, end)| range.end.min(*end) - range.start.max(start))
            .sum()
    }

    /// The parts of `range` that are in the set, in order.
    pub(crate) fn parts(&self, range: Range<usize>) -> impl Iterator<Item = Range<usize>> + '_ {
        let first = self.at_or_after(range.start);
        let first = first.map_or(range.end, |found| found.start);
        let stored = self.0.range(first..range.end.max(first));
        stored.map(move |(start, end)| range.start.max(start)..range.end.min(*end))
    }

    /// The sum of the lengths.
    pub(crate) fn total(&self) -> usize {
        self.0.iter().map(|(start, end)| end - start).sum()
    }

    /// The stored intervals in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.0.iter().map(|(start, end)| start..*end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const SPACE: usize = 48;

    proptest! {
        #[test]
        fn it_answers_as_a_set_of_points(steps in prop::collection::vec((0..SPACE, 1..12usize, any::<bool>()), 1..200)) {
            let (mut intervals, mut points) = (Intervals::default(), BTreeSet::new());
            for (start, length, add) in steps {
                let range = start..(start + length).min(SPACE);
                let inside = range.clone().filter(|point| points.contains(point)).count();
                prop_assert_eq!(intervals.overlaps(&range), inside > 0);
                prop_assert_eq!(intervals.contains(&range), inside == range.len());
                prop_assert_eq!(intervals.within(&range), inside);
                let parts: Vec<_> = intervals.parts(range.clone()).flatten().collect();
                let expected: Vec<_> = range.clone().filter(|point| points.contains(point)).collect();
                prop_assert_eq!(parts, expected);
                if add && inside == 0 {
                    intervals.insert(range.clone());
                    points.extend(range);
                } else if !add && inside == range.len() {
                    intervals.remove(&range);
                    range.for_each(|point| { points.remove(&point); });
                }
                prop_assert_eq!(intervals.total(), points.len());
                let stored: Vec<_> = intervals.iter().collect();
                prop_assert!(stored.iter().cloned().flatten().eq(points.iter().copied()));
                prop_assert_eq!(intervals.is_empty(), points.is_empty());
                prop_assert!(stored.windows(2).all(|pair| pair[0].end < pair[1].start), "not merged: {stored:?}");
                for point in 0..=SPACE {
                    let before = (0..point).rev().take_while(|point| points.contains(point)).count();
                    let ends = before > 0 && !points.contains(&point);
                    prop_assert_eq!(intervals.length_before(point), if ends { before } else { 0 });
                }
                let outside: Vec<_> = intervals.gaps(5..40).flatten().collect();
                let expected: Vec<_> = (5..40).filter(|point| !points.contains(point)).collect();
                prop_assert_eq!(outside, expected);
            }
        }
    }
}
