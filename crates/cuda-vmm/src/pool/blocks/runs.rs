//! Block numbers as runs of neighbours.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::BlockId;
use core::ops::Range;

/// Runs of numbers, in order; between two of them a number is missing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Runs(Vec<Range<BlockId>>);

impl Runs {
    /// The runs of numbers that come in order.
    pub(super) fn of_ordered(blocks: impl IntoIterator<Item = BlockId>) -> Self {
        let mut runs: Vec<Range<BlockId>> = Vec::new();
        for block in blocks {
            match runs.last_mut() {
                Some(run) if run.end == block => run.end += 1,
                // Named twice.
                Some(run) if run.end > block => debug_assert!(run.end == block + 1),
                _ => runs.push(block..block + 1),
            }
        }
        Self(runs)
    }

    /// The runs of numbers in any order, which may come twice.
    pub(super) fn of(blocks: impl IntoIterator<Item = BlockId>) -> Self {
        let mut blocks: Vec<_> = blocks.into_iter().collect();
        blocks.sort_unstable();
        Self::of_ordered(blocks)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Range<BlockId>> + '_ {
        self.0.iter().cloned()
    }

    pub(super) fn blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.iter().flatten()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn runs_are_the_set_of_what_was_named(blocks in prop::collection::vec(0..40usize, 0..60)) {
            let runs = Runs::of(blocks.clone());
            let set: BTreeSet<_> = blocks.into_iter().collect();
            prop_assert!(runs.blocks().eq(set.into_iter()));
            let bounds: Vec<_> = runs.iter().collect();
            prop_assert!(bounds.windows(2).all(|pair| pair[0].end < pair[1].start));
        }
    }
}
