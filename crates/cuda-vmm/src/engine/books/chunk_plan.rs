//! Which chunks back one allocation.

use super::pages::{Pages, Survey};
use super::policy::{chunk_pages, cut, grown_end};
use crate::size::Extent;
use core::ops;

/// What a range and its engine say about chunks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ChunkRules {
    /// Addresses of the range, in bytes.
    pub(crate) capacity_bytes: usize,
    pub(crate) page_bytes: usize,
    /// The largest chunk, in bytes.
    pub(crate) chunk_bytes_max: usize,
    /// Whether each run of missing pages is one chunk.
    pub(crate) single_handle: bool,
}

/// Which chunks an allocation takes.
#[derive(Debug)]
pub(crate) struct ChunkPlan {
    /// What the allocation finds, and so what is missing.
    pub(crate) survey: Survey,
    /// Pages that its last chunk backs beyond those that are missing, because an extent grows.
    pub(crate) spare_pages: usize,
    /// The largest chunk in pages; `None` if each run of missing pages is to be one chunk.
    largest: Option<usize>,
}

impl ChunkPlan {
    pub(crate) fn new<M>(
        pages: &Pages<M>,
        extent: &Extent,
        survey: Survey,
        rules: &ChunkRules,
    ) -> Self {
        let page_bytes = rules.page_bytes;
        let mut plan = Self {
            survey,
            spare_pages: 0,
            largest: None,
        };
        let Some(last) = plan.survey.missing.last() else {
            return plan;
        };
        if rules.single_handle {
            return plan;
        }
        let bytes = extent.range();
        let grown_bytes = pages.extent_bytes(bytes.start) + bytes.len();
        let largest = chunk_pages(
            grown_bytes.div_ceil(page_bytes),
            page_bytes,
            rules.chunk_bytes_max,
        );
        plan.largest = Some(largest);
        if grown_bytes > bytes.len() && last.end == extent.pages(page_bytes).end {
            let end = pages.next_chunk(last.end, rules.capacity_bytes.div_ceil(page_bytes));
            plan.spare_pages = grown_end(last, largest, end) - last.end;
        }
        plan
    }

    /// The runs to back: those that are missing, the last one with the spare pages.
    pub(crate) fn runs(&self) -> impl Iterator<Item = ops::Range<usize>> + '_ {
        let last = self.survey.missing.len().saturating_sub(1);
        let runs = self.survey.missing.iter().enumerate();
        runs.map(move |(index, run)| {
            let spare = if index == last { self.spare_pages } else { 0 };
            run.start..run.end + spare
        })
    }

    /// Pages that it backs.
    pub(crate) fn pages(&self) -> usize {
        self.survey.missing_pages() + self.spare_pages
    }

    /// The chunks to make, in order.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = ops::Range<usize>> + '_ {
        self.runs().flat_map(|run| {
            let whole = self.largest.is_none().then(|| run.clone());
            let parts = self.largest.map(|largest| cut(run, largest));
            whole.into_iter().chain(parts.into_iter().flatten())
        })
    }

    /// Whether a chunk may be made as two halves, if the device has no memory for it whole.
    pub(crate) fn may_halve(&self, chunk: &ops::Range<usize>) -> bool {
        self.largest.is_some() && chunk.len() > 1
    }

    /// Whether a chunk backs pages that are asked for, and is not only spare.
    pub(crate) fn is_asked_for(&self, chunk: &ops::Range<usize>) -> bool {
        let last = self.survey.missing.last();
        last.is_some_and(|last| chunk.start < last.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: usize = 8;
    const PAGES: usize = 64;
    /// The range ends within its last page.
    const CAPACITY: usize = PAGES * PAGE - 3;

    fn rules(single_handle: bool) -> ChunkRules {
        ChunkRules {
            capacity_bytes: CAPACITY,
            page_bytes: PAGE,
            chunk_bytes_max: 4 * PAGE,
            single_handle,
        }
    }

    /// What an allocation takes, if none of its bytes is live.
    fn plan(pages: &Pages<usize>, extent: &Extent, rules: &ChunkRules) -> Option<ChunkPlan> {
        let survey = pages.survey(&extent.range())?;
        Some(ChunkPlan::new(pages, extent, survey, rules))
    }

    fn allocate(pages: &mut Pages<usize>, bytes: ops::Range<usize>, single_handle: bool) {
        let extent = Extent::new(bytes.start, bytes.len(), CAPACITY).expect("inside");
        let plan = plan(pages, &extent, &rules(single_handle)).expect("not live");
        pages.begin(&bytes, &plan.survey, plan.runs());
        let chunks = plan.chunks();
        pages.finish(&bytes, chunks.map(|chunk| (chunk.clone(), chunk.start)));
    }

    #[test]
    fn the_last_chunk_of_an_extent_that_grows_reaches_beyond_what_is_asked_for() {
        let mut pages = Pages::new(PAGE);
        allocate(&mut pages, 0..32 * PAGE, false);
        let extent = Extent::new(32 * PAGE, PAGE, CAPACITY).expect("inside");
        let grown = plan(&pages, &extent, &rules(false)).expect("not live");
        assert!(grown.chunks().eq(core::iter::once(32..36)));
        assert_eq!((grown.pages(), grown.spare_pages), (4, 3));
        assert!(grown.runs().eq(core::iter::once(32..36)));
        assert!(grown.is_asked_for(&(32..33)) && !grown.is_asked_for(&(33..34)));
        assert!(grown.may_halve(&(32..34)) && !grown.may_halve(&(32..33)));
        let whole = plan(&pages, &extent, &rules(true)).expect("not live");
        assert!(whole.chunks().eq(core::iter::once(32..33)));
        assert!(!whole.may_halve(&(32..36)), "each run is one chunk");
        // Not beyond a chunk that is there, and not if the extent does not grow.
        allocate(&mut pages, 34 * PAGE..35 * PAGE, false);
        let bounded = plan(&pages, &extent, &rules(false)).expect("not live");
        assert!(bounded.chunks().eq(core::iter::once(32..34)));
        let apart = Extent::new(40 * PAGE, PAGE, CAPACITY).expect("inside");
        let apart = plan(&pages, &apart, &rules(false)).expect("not live");
        assert!(apart.chunks().eq(core::iter::once(40..41)));
        // At the end of the range, its last page is taken as well.
        allocate(&mut pages, 35 * PAGE..62 * PAGE, false);
        let last = Extent::new(62 * PAGE, 1, CAPACITY).expect("inside");
        let last = plan(&pages, &last, &rules(false)).expect("not live");
        assert!(last.chunks().eq(core::iter::once(62..64)));
    }

    proptest! {
        #[test]
        fn what_is_missing_is_backed_and_the_last_run_alone_reaches_further(
            before in prop::collection::vec((0..PAGES - 1, 1..12usize), 0..8),
            (first, count) in (0..PAGES - 1, 1..40usize),
            single_handle in any::<bool>(),
        ) {
            let bytes = |first: usize, count: usize| {
                first * PAGE..((first + count) * PAGE).min(CAPACITY)
            };
            let mut pages = Pages::new(PAGE);
            for (first, count) in before {
                let bytes = bytes(first, count);
                if pages.survey(&bytes).is_some() {
                    allocate(&mut pages, bytes, single_handle);
                }
            }
            let bytes = bytes(first, count);
            let extent = Extent::new(bytes.start, bytes.len(), CAPACITY).expect("inside");
            let Some(plan) = plan(&pages, &extent, &rules(single_handle)) else {
                return Ok(());
            };
            let missing = plan.survey.missing.clone();
            let runs: Vec<_> = plan.runs().collect();
            prop_assert_eq!(runs.len(), missing.len());
            for (index, (run, missing)) in runs.iter().zip(&missing).enumerate() {
                let spare = if index + 1 == runs.len() { plan.spare_pages } else { 0 };
                prop_assert_eq!(run.clone(), missing.start..missing.end + spare);
            }
            prop_assert_eq!(plan.pages(), runs.iter().map(ops::Range::len).sum::<usize>());
            let chunks: Vec<_> = plan.chunks().collect();
            prop_assert!(chunks.iter().cloned().flatten().eq(runs.iter().cloned().flatten()));
            if let Some(last) = runs.last() {
                prop_assert_eq!(pages.next_chunk(last.start, last.end), last.end);
                prop_assert!(last.end <= PAGES);
            }
            for chunk in &chunks {
                prop_assert!(plan.is_asked_for(chunk));
                prop_assert_eq!(plan.may_halve(chunk), !single_handle && chunk.len() > 1);
                prop_assert!(single_handle || chunk.len() <= 4);
            }
            let grows = pages.extent_bytes(bytes.start) > 0;
            prop_assert!(plan.spare_pages == 0 || (grows && !single_handle));
            match single_handle {
                true => prop_assert_eq!(chunks, runs),
                false => prop_assert!(plan.spare_pages < 4),
            }
        }
    }
}
