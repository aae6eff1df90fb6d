//! In which order the contents of a range come back. Pure: numbers only.
#![forbid(unsafe_code)]

use crate::engine::books::intervals::Intervals;
use core::ops::Range;

/// Bytes of a range, and where their contents begin among all contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) bytes: Range<usize>,
    pub(super) at: usize,
}

/// All live bytes in parts of at most `part_bytes` bytes: those of `first` in their order, then all
/// others. Each byte is in one part; what of `first` is not live is in none.
pub(super) fn in_order(live: &Intervals, first: &[Range<usize>], part_bytes: usize) -> Vec<Part> {
    // Where the contents of each extent begin.
    let mut begins = Vec::new();
    let mut at = 0;
    for extent in live.iter() {
        begins.push((extent.start, at));
        at += extent.len();
    }
    let part = |bytes: Range<usize>| {
        let after = begins.partition_point(|(start, _)| *start <= bytes.start);
        let (start, at) = begins[after - 1];
        let at = at + (bytes.start - start);
        Part { bytes, at }
    };
    let cut = |bytes: Range<usize>| {
        let starts = bytes.clone().step_by(part_bytes);
        starts.map(move |start| start..bytes.end.min(start + part_bytes))
    };
    let (mut left, mut parts) = (live.clone(), Vec::new());
    for bytes in first.iter().filter(|bytes| !bytes.is_empty()) {
        let found: Vec<_> = left.parts(bytes.clone()).collect();
        found.iter().for_each(|bytes| left.remove(bytes));
        parts.extend(found.into_iter().flat_map(cut).map(part));
    }
    parts.extend(left.iter().flat_map(cut).map(part));
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn live(extents: &[Range<usize>]) -> Intervals {
        let mut live = Intervals::default();
        extents.iter().cloned().for_each(|bytes| live.insert(bytes));
        live
    }

    fn part(bytes: Range<usize>, at: usize) -> Part {
        Part { bytes, at }
    }

    #[test]
    fn what_is_wanted_first_comes_first_and_once() {
        let live = live(&[10..20, 30..40]);
        assert_eq!(
            in_order(&live, &[32..50, 0..12, 35..37], 100),
            [
                part(32..40, 12),
                part(10..12, 0),
                part(12..20, 2),
                part(30..32, 10)
            ]
        );
        assert_eq!(
            in_order(&live, &[], 6),
            [
                part(10..16, 0),
                part(16..20, 6),
                part(30..36, 10),
                part(36..40, 16)
            ]
        );
        assert_eq!(in_order(&Intervals::default(), &[0..9, 3..4], 1), []);
    }

    proptest! {
        /// Against a list of all live bytes, each with its place among the contents.
        #[test]
        fn each_live_byte_comes_once_from_its_own_place(
            bytes in prop::collection::btree_set(0..64usize, 0..40),
            first in prop::collection::vec((0..70usize, 0..20usize), 0..6),
            part_bytes in 1..9usize,
        ) {
            let mut live = Intervals::default();
            bytes.iter().for_each(|byte| live.insert(*byte..byte + 1));
            let first: Vec<_> = first.iter().map(|(start, long)| *start..start + long).collect();
            let parts = in_order(&live, &first, part_bytes);
            prop_assert!(parts.iter().all(|part| (1..=part_bytes).contains(&part.bytes.len())));
            let came = parts.iter().flat_map(|part| part.bytes.clone().zip(part.at..));
            let came: Vec<_> = came.collect();
            let mut wanted: Vec<usize> = Vec::new();
            for byte in first.into_iter().flatten().chain(0..64) {
                if bytes.contains(&byte) && !wanted.contains(&byte) {
                    wanted.push(byte);
                }
            }
            let place = |byte: &usize| bytes.range(..byte).count();
            let wanted: Vec<_> = wanted.iter().map(|byte| (*byte, place(byte))).collect();
            prop_assert_eq!(came, wanted);
        }
    }
}
