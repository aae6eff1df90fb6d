//! Which bytes are covered by intervals that may overlap, and come and go.

use core::ops::Range;
use std::collections::{BTreeMap, BTreeSet};

/// Non-empty intervals, each with a number of its own.
///
/// They are kept by the power of two of their length, and then by their start. An interval that
/// overlaps some bytes begins less than its length before them. So to find those of one power, only
/// starts near the bytes are looked at, however long intervals of other powers are. To tell what is
/// covered, of intervals with one start, such as the views of a cache that grows, only the longest
/// counts.
#[derive(Debug, Default)]
pub(crate) struct Cover {
    by_power: BTreeMap<u32, ByStart>,
}

/// The ends and numbers of intervals, by their starts.
type ByStart = BTreeMap<usize, BTreeSet<(usize, u64)>>;

fn power(interval: &Range<usize>) -> u32 {
    interval.len().ilog2()
}

impl Cover {
    /// Adds an interval.
    pub(crate) fn add(&mut self, interval: &Range<usize>, number: u64) {
        let by_start = self.by_power.entry(power(interval)).or_default();
        let ends = by_start.entry(interval.start).or_default();
        ends.insert((interval.end, number));
    }

    /// Takes an interval out.
    pub(crate) fn remove(&mut self, interval: &Range<usize>, number: u64) {
        let power = power(interval);
        let Some(by_start) = self.by_power.get_mut(&power) else {
            return;
        };
        let Some(ends) = by_start.get_mut(&interval.start) else {
            return;
        };
        ends.remove(&(interval.end, number));
        if ends.is_empty() {
            by_start.remove(&interval.start);
        }
        if by_start.is_empty() {
            self.by_power.remove(&power);
        }
    }

    /// The ends and numbers of the intervals that begin before the end of some bytes, and not too
    /// far ahead of them to overlap them.
    fn near(
        &self,
        bytes: &Range<usize>,
    ) -> impl Iterator<Item = (usize, &BTreeSet<(usize, u64)>)> + use<'_> {
        let bytes = bytes.clone();
        self.by_power.iter().flat_map(move |(power, by_start)| {
            // None of this power is as long as two to the next.
            let longest = 1_usize.checked_shl(power + 1).unwrap_or(usize::MAX);
            let first = bytes.start.saturating_sub(longest);
            let near = by_start.range(first..bytes.end);
            near.map(|(start, ends)| (*start, ends))
        })
    }

    /// Intervals that overlap some bytes, of each start the longest, cut to these.
    fn over<'a>(&'a self, bytes: &'a Range<usize>) -> impl Iterator<Item = Range<usize>> + 'a {
        self.near(bytes).filter_map(|(start, ends)| {
            let (end, _) = ends.last()?;
            let part = bytes.start.max(start)..bytes.end.min(*end);
            (!part.is_empty()).then_some(part)
        })
    }

    /// The numbers of the intervals that overlap some bytes.
    pub(crate) fn numbers(&self, bytes: &Range<usize>) -> impl Iterator<Item = u64> + '_ {
        let behind = (bytes.start.saturating_add(1), 0)..;
        let near = self.near(bytes);
        near.flat_map(move |(_, ends)| ends.range(behind.clone()).map(|(_, number)| *number))
    }

    /// Whether any of the bytes is covered.
    pub(crate) fn overlaps(&self, bytes: &Range<usize>) -> bool {
        self.over(bytes).next().is_some()
    }

    /// The parts of some bytes that are not covered, in order.
    pub(crate) fn gaps(&self, bytes: &Range<usize>) -> Vec<Range<usize>> {
        let mut covered: Vec<_> = self.over(bytes).collect();
        covered.sort_by_key(|part| part.start);
        let mut at = bytes.start;
        let mut gaps = Vec::new();
        for part in covered {
            if at < part.start {
                gaps.push(at..part.start);
            }
            at = at.max(part.end);
        }
        if at < bytes.end {
            gaps.push(at..bytes.end);
        }
        gaps
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SPACE: usize = 64;

    proptest! {
        #[test]
        fn it_says_as_a_list_of_intervals_does(
            steps in prop::collection::vec((0..SPACE, 1..40usize, any::<bool>()), 1..100),
        ) {
            let (mut cover, mut list) = (Cover::default(), Vec::new());
            for (step, (start, length, adds)) in steps.into_iter().enumerate() {
                let bytes = start..start + length;
                if adds || list.is_empty() {
                    cover.add(&bytes, step as u64);
                    list.push((bytes.clone(), step as u64));
                } else {
                    let (bytes, number) = list.swap_remove(start % list.len());
                    cover.remove(&bytes, number);
                }
                let overlaps = |other: &Range<usize>| {
                    other.start < bytes.end && bytes.start < other.end
                };
                let numbers: BTreeSet<u64> = cover.numbers(&bytes).collect();
                let over = list.iter().filter(|(range, _)| overlaps(range));
                prop_assert_eq!(numbers, over.map(|(_, number)| *number).collect());
                let is_covered = |byte: &usize| list.iter().any(|(range, _)| range.contains(byte));
                let expected: Vec<_> = bytes.clone().filter(|byte| !is_covered(byte)).collect();
                prop_assert_eq!(cover.overlaps(&bytes), expected.len() < bytes.len());
                let gaps = cover.gaps(&bytes);
                prop_assert!(gaps.windows(2).all(|pair| pair[0].end < pair[1].start));
                prop_assert!(gaps.iter().all(|gap| !gap.is_empty()));
                prop_assert_eq!(gaps.into_iter().flatten().collect::<Vec<_>>(), expected);
            }
            for (range, number) in list {
                cover.remove(&range, number);
            }
            prop_assert!(cover.by_power.is_empty());
        }
    }
}
