//! The pages that allocations of a range will need next.

use super::intervals::Intervals;
use crate::size::push_run;
use core::ops::Range;

/// Runs of pages in the order in which allocations will need them. No page is in two of them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Hint {
    runs: Vec<Range<usize>>,
    /// The same pages, by number.
    pages: Intervals,
}

impl Hint {
    /// The runs in this order. A page that comes twice counts where it comes first.
    pub(crate) fn new(runs: impl IntoIterator<Item = Range<usize>>) -> Self {
        let mut hint = Self::default();
        for run in runs {
            let fresh: Vec<_> = hint.pages.gaps(run).collect();
            for part in fresh {
                hint.pages.insert(part.clone());
                push_run(&mut hint.runs, part);
            }
        }
        hint
    }

    /// How many pages there are.
    pub(crate) fn len(&self) -> usize {
        self.pages.total()
    }

    /// The first pages, at most this many, as runs in order.
    pub(crate) fn first(&self, mut pages: usize) -> impl Iterator<Item = Range<usize>> + '_ {
        self.runs.iter().map_while(move |run| {
            let end = run.start + run.len().min(pages);
            pages -= end - run.start;
            (end > run.start).then_some(run.start..end)
        })
    }

    /// Whether any of these pages is among them.
    pub(crate) fn overlaps(&self, pages: &Range<usize>) -> bool {
        self.pages.overlaps(pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pages_keep_their_order_and_come_once(
            runs in prop::collection::vec((0..40usize, 0..6usize), 0..12), most in 0..50usize,
        ) {
            let runs = runs.into_iter().map(|(start, pages)| start..start + pages);
            let mut model: Vec<usize> = Vec::new();
            for page in runs.clone().flatten() {
                if !model.contains(&page) {
                    model.push(page);
                }
            }
            let hint = Hint::new(runs);
            prop_assert_eq!(hint.len(), model.len());
            for page in 0..50 {
                prop_assert_eq!(hint.overlaps(&(page..page + 1)), model.contains(&page));
            }
            model.truncate(most);
            prop_assert!(hint.first(most).flatten().eq(model));
            let runs: Vec<_> = hint.first(most).collect();
            prop_assert!(runs.iter().all(|run| !run.is_empty()));
            prop_assert!(runs.windows(2).all(|pair| pair[0].end != pair[1].start));
        }
    }
}
