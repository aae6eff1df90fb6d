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
