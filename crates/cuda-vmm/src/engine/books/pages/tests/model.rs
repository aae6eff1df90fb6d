//! The plainest account of a range.

use super::super::*;
use super::{CAPACITY, PAGE, PAGES};
use proptest::prelude::*;
use std::collections::BTreeSet;

/// The plainest account of the same facts: one entry for each byte and each page.
pub(super) struct Model {
    pub(super) live: [bool; CAPACITY],
    pub(super) backing: [Option<(usize, ChunkState)>; PAGES],
    /// First pages of what was made ahead and not taken.
    pub(super) ahead: BTreeSet<usize>,
    /// First pages of chunks whose memory others map too.
    pub(super) shared: BTreeSet<usize>,
}

impl Model {
    pub(super) fn page_live(&self, page: usize) -> bool {
        (page * PAGE..((page + 1) * PAGE).min(CAPACITY)).any(|byte| self.live[byte])
    }

    pub(super) fn retire_unused(&mut self) {
        for first in 0..PAGES {
            let chunk: Vec<_> = (0..PAGES)
                .filter(|page| self.backing[*page] == Some((first, ChunkState::Backed)))
                .collect();
            if !chunk.is_empty() && !chunk.iter().any(|page| self.page_live(*page)) {
                for page in chunk {
                    self.backing[page] = Some((first, ChunkState::Retiring));
                }
            }
        }
    }

    /// An allocation has used what a survey found parked or retiring.
    pub(super) fn taken(&mut self, survey: &Survey) {
        for first in survey.unused() {
            self.ahead.remove(&first);
            let entries = self.backing.iter_mut().flatten();
            for entry in entries.filter(|(of, _)| *of == first) {
                entry.1 = ChunkState::Backed;
            }
        }
    }

    /// The chunk that backs all of these pages, if one does.
    pub(super) fn whole_chunk(&self, pages: &Range<usize>) -> Option<(usize, ChunkState)> {
        let first = self.backing[pages.start]?;
        let mut backing = pages.clone().map(|page| self.backing[page]);
        backing.all(|entry| entry == Some(first)).then_some(first)
    }

    pub(super) fn check(&self, pages: &mut Pages<usize>) -> Result<(), TestCaseError> {
        let is_shared = |first: &usize| self.shared.contains(first);
        let count = |wanted: ChunkState| {
            let of = |entry: &&Option<(usize, ChunkState)>| {
                entry.is_some_and(|(first, state)| state == wanted && !is_shared(&first))
            };
            self.backing.iter().filter(of).count() * PAGE
        };
        let of_shared =
            |page: &usize| self.backing[*page].is_some_and(|(first, _)| is_shared(&first));
        let all_live = (0..PAGES).filter(|page| self.page_live(*page));
        prop_assert_eq!(pages.live_pages(), all_live.clone().count());
        let live_pages = all_live.filter(|page| !of_shared(page)).count();
        prop_assert_eq!(pages.shared_pages(), (0..PAGES).filter(of_shared).count());
        let leaving = self.shared.iter().copied();
        let is_parked = |first: &usize| self.backing[*first] == Some((*first, ChunkState::Parked));
        prop_assert!(pages.leaving().eq(leaving.filter(is_parked)));
        let ahead_bytes = self.ahead.len() * PAGE;
        prop_assert_eq!(
            pages.parts(),
            MemoryParts {
                filling_bytes: 0,
                live_page_bytes: live_pages * PAGE,
                cached_bytes: 0,
                leased_bytes: 0,
                shared_bytes: 0,
                slack_bytes: count(ChunkState::Backed) - live_pages * PAGE,
                retiring_bytes: count(ChunkState::Retiring),
                parked_bytes: count(ChunkState::Parked) - ahead_bytes,
                ahead_bytes,
                quarantined_bytes: count(ChunkState::Quarantined),
            }
        );
        prop_assert_eq!(
            pages.live().total(),
            self.live.iter().filter(|live| **live).count()
        );
        for (_, chunk) in pages.chunks.iter() {
            prop_assert_eq!(chunk.live_pages <= chunk.pages, true);
        }
        self.check_chunks(pages)?;
        self.check_bytes(pages)
    }
}
