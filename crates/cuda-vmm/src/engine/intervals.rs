//! A set of integers kept as merged intervals.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use core::ops::Range;
use std::collections::BTreeMap;

/// Merged, disjoint, non-empty intervals: neighbours that touch are one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Intervals(BTreeMap<usize, usize>);

/// The stored intervals before and after a range that is not in the set.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Around {
    pub(crate) before: Option<Range<usize>>,
    pub(crate) after: Option<Range<usize>>,
}

impl Intervals {
    /// The stored interval that holds `point`, or else the next one after it.
    fn at_or_after(&self, point: usize) -> Option<Range<usize>> {
        self.0
            .range(..=point)
            .next_back()
            .filter(|(_, end)| **end > point)
            .or_else(|| self.0.range(point..).next())
            .map(|(start, end)| *start..*end)
    }

    /// The length of the stored interval that ends at `point`; 0 if none does.
    pub(crate) fn length_before(&self, point: usize) -> usize {
        let before = self.0.range(..point).next_back();
        before
            .filter(|(_, end)| **end == point)
            .map_or(0, |(start, end)| end - start)
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
    pub(crate) fn around(&self, range: &Range<usize>) -> Option<Around> {
        let before = self.0.range(..range.end).next_back();
        let before = before.map(|(start, end)| *start..*end);
        if before
            .as_ref()
            .is_some_and(|before| before.end > range.start)
        {
            return None;
        }
        let after = self.0.range(range.end..).next();
        let after = after.map(|(start, end)| *start..*end);
        Some(Around { before, after })
    }

    /// Adds a non-empty range that does not overlap the set.
    pub(crate) fn insert(&mut self, range: Range<usize>) {
        if let Some(around) = self.around(&range) {
            self.insert_between(range, &around);
        }
    }

    /// Adds a non-empty range, of which is known what is around it.
    pub(crate) fn insert_between(&mut self, range: Range<usize>, around: &Around) {
        debug_assert!(!range.is_empty() && self.around(&range).as_ref() == Some(around));
        let (mut start, mut end) = (range.start, range.end);
        if let Some(before) = &around.before
            && before.end == start
        {
            start = before.start;
        }
        if let Some(after) = &around.after
            && after.start == end
        {
            self.0.remove(&after.start);
            end = after.end;
        }
        self.0.insert(start, end);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes out a non-empty range that lies wholly in the set.
    pub(crate) fn remove(&mut self, range: &Range<usize>) {
        debug_assert!(!range.is_empty() && self.contains(range));
        if let Some(found) = self.at_or_after(range.start) {
            self.0.remove(&found.start);
            if found.start < range.start {
                self.0.insert(found.start, range.start);
            }
            if range.end < found.end {
                self.0.insert(range.end, found.end);
            }
        }
    }

    /// The parts of `within` that are not in the set, in order.
    pub(crate) fn gaps(&self, within: Range<usize>) -> impl Iterator<Item = Range<usize>> + '_ {
        let mut at = within.start;
        let first = self
            .at_or_after(within.start)
            .map_or(within.end, |found| found.start);
        let mut stored = self.0.range(first..);
        core::iter::from_fn(move || {
            while at < within.end {
                let (start, end) = stored
                    .next()
                    .map_or((within.end, usize::MAX), |(start, end)| (*start, *end));
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
        let stored = self
            .0
            .range(first..)
            .take_while(|(start, _)| **start < range.end);
        stored
            .map(|(start, end)| range.end.min(*end) - range.start.max(*start))
            .sum()
    }

    /// The sum of the lengths.
    pub(crate) fn total(&self) -> usize {
        self.0.iter().map(|(start, end)| end - start).sum()
    }

    /// The stored intervals in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.0.iter().map(|(start, end)| *start..*end)
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
                if add && inside == 0 {
                    intervals.insert(range.clone());
                    points.extend(range);
                } else if !add && inside == range.len() {
                    intervals.remove(&range);
                    range.for_each(|point| { points.remove(&point); });
                }
                prop_assert_eq!(intervals.total(), points.len());
                let stored: Vec<_> = intervals.iter().collect();
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
