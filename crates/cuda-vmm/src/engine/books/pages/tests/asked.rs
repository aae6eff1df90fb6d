//! What the books answer about chunks and bytes, against the same plain account.

use super::super::*;
use super::model::Model;
use super::{CAPACITY, PAGE, PAGES};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const STATES: [ChunkState; 9] = [
    ChunkState::Filling,
    ChunkState::Backed,
    ChunkState::Retiring,
    ChunkState::Parked,
    ChunkState::Draining,
    ChunkState::Quarantined,
    ChunkState::Relocating,
    ChunkState::Stranded,
    ChunkState::Restoring,
];

impl Model {
    /// The pages of each chunk and what it is, by its first page.
    fn chunks(&self) -> BTreeMap<usize, (Range<usize>, ChunkState)> {
        let mut chunks = BTreeMap::new();
        for (page, entry) in self.backing.iter().enumerate() {
            if let Some((first, state)) = *entry {
                let chunk = chunks.entry(first).or_insert((first..first, state));
                chunk.0.end = page + 1;
            }
        }
        chunks
    }

    fn is_shared_page(&self, page: usize) -> bool {
        self.backing[page].is_some_and(|(first, _)| self.shared.contains(&first))
    }

    /// What a survey of these pages says beyond the lists.
    pub(super) fn check_survey(
        &self,
        survey: &Survey,
        touched: &Range<usize>,
    ) -> Result<(), TestCaseError> {
        let missing = touched.clone().filter(|page| self.backing[*page].is_none());
        prop_assert_eq!(survey.missing_pages(), missing.count());
        let unused = survey.parked.iter().chain(&survey.retiring);
        prop_assert!(survey.unused().eq(unused.copied()));
        let is_there = |page: usize| {
            let state = self.backing[page].map(|(_, state)| state);
            let is_idle = matches!(state, Some(ChunkState::Backed | ChunkState::Parked));
            is_idle && !self.is_shared_page(page)
        };
        let backed = touched.clone().all(is_there);
        prop_assert_eq!(survey.is_there(), backed);
        Ok(())
    }

    /// What is said of each chunk, and which there are. No thread works on any.
    pub(super) fn check_chunks(&self, pages: &mut Pages<usize>) -> Result<(), TestCaseError> {
        let chunks = self.chunks();
        prop_assert_eq!(pages.chunks(), chunks.len());
        for page in 0..PAGES {
            let chunk = chunks.get(&page);
            let len = chunk.map_or(0, |(of_chunk, _)| of_chunk.len());
            prop_assert_eq!(pages.chunk_at(page), page..page + len);
            prop_assert_eq!(pages.chunk_bytes(page), len * PAGE);
            prop_assert_eq!(pages.state_of(page), chunk.map(|(_, state)| *state));
            prop_assert_eq!(pages.memory(page), chunk.map(|_| &page));
            prop_assert!(!pages.is_in_hand(page));
            let end = (PAGES / 2).max(page);
            let next = chunks.range(page..end).next();
            let next = next.map_or(end, |(first, _)| *first);
            prop_assert_eq!(pages.next_chunk(page, end), next);
        }
        for wanted in STATES {
            let of_state = chunks.iter().filter(|(_, (_, state))| *state == wanted);
            let of_state: Vec<_> = of_state.map(|(first, _)| *first).collect();
            prop_assert_eq!(pages.any_in_state(wanted), !of_state.is_empty());
            prop_assert_eq!(pages.in_state(wanted), of_state);
        }
        let is_refused = !pages.in_state(ChunkState::Quarantined).is_empty();
        prop_assert_eq!(pages.is_any_refused(), is_refused);
        prop_assert_eq!(pages.any_shared(), !self.shared.is_empty());
        prop_assert!(!pages.is_any_pending() && !pages.is_worked_on());
        let parked = pages.in_state(ChunkState::Parked).into_iter();
        let own =
            parked.filter(|first| !self.ahead.contains(first) && !self.shared.contains(first));
        prop_assert_eq!(pages.parked().collect::<BTreeSet<_>>(), own.collect());
        let first = pages.parked().next();
        prop_assert_eq!(pages.first_parked(), first);
        Ok(())
    }

    /// What is said of runs of bytes.
    pub(super) fn check_bytes(&self, pages: &Pages<usize>) -> Result<(), TestCaseError> {
        let chunks = self.chunks();
        for start in (0..CAPACITY).step_by(11) {
            let bytes = start..(start + 1 + start * 7 % 30).min(CAPACITY);
            let touched = bytes.start / PAGE..bytes.end.div_ceil(PAGE);
            let whole = self.whole_chunk(&touched);
            let is_backed = whole.is_some_and(|(_, state)| state == ChunkState::Backed);
            prop_assert_eq!(pages.is_within_backed(&bytes), is_backed);
            let is_beyond = self.backing[touched.start].is_some() && whole.is_none();
            prop_assert_eq!(pages.is_beyond_chunk(&bytes), is_beyond);
            let is_taken = bytes.clone().any(|byte| self.live[byte]);
            prop_assert_eq!(pages.has_taken(&bytes), is_taken);
            prop_assert!(!pages.is_stranded(&bytes));
            let overlaps =
                |chunk: &Range<usize>| chunk.start < touched.end && touched.start < chunk.end;
            let shared = self.shared.iter().map(|first| chunks[first].0.clone());
            let shared: Vec<_> = shared.filter(overlaps).collect();
            prop_assert_eq!(pages.shared_chunks(&bytes).collect::<Vec<_>>(), shared);
            let is_whole = |(_, (of_chunk, state)): &(&usize, &(Range<usize>, ChunkState))| {
                let own = of_chunk.start * PAGE..of_chunk.end * PAGE;
                let inside = bytes.start <= own.start && own.end <= bytes.end;
                *state == ChunkState::Backed && inside && { own }.all(|byte| self.live[byte])
            };
            for page in [0, touched.start, touched.start + 1] {
                let from = chunks.range(page..).filter(is_whole);
                let whole = from.map(|(_, (of_chunk, _))| of_chunk.clone());
                prop_assert!(pages.whole_chunks(&bytes, page).eq(whole));
            }
            let end = bytes.end;
            let live = (0..end).rev().take_while(|byte| self.live[*byte]).count();
            let extends = live > 0 && !(end < CAPACITY && self.live[end]);
            let extent = if extends { live } else { 0 };
            let last = self.shared.iter().map(|first| chunks[first].0.end).max();
            let own = end.saturating_sub(last.unwrap_or(0) * PAGE);
            prop_assert!(pages.extent_bytes(end) <= extent.min(own));
            if self.shared.is_empty() {
                prop_assert_eq!(pages.extent_bytes(end), extent);
            }
        }
        // From each byte on, how many are unused.
        let mut runs = [0; CAPACITY + 1];
        for byte in (0..CAPACITY).rev() {
            let is_unused = !self.live[byte] && !self.is_shared_page(byte / PAGE);
            runs[byte] = if is_unused { runs[byte + 1] + 1 } else { 0 };
        }
        for (bytes, alignment) in [(1, 1), (9, 4), (25, 8), (60, 1)] {
            let mut starts = (0..CAPACITY).step_by(alignment);
            let place = starts.find(|at| runs[*at] >= bytes);
            let largest = runs.iter().copied().max().unwrap_or(0);
            let found = pages.place(bytes, alignment, CAPACITY);
            prop_assert_eq!(found, place.ok_or(largest));
        }
        Ok(())
    }
}
