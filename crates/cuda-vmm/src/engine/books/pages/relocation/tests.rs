//! Moves of chunks in the books of a range, against what each page holds.

use super::*;
use crate::MemoryParts;
use proptest::prelude::*;

const PAGE: usize = 8;
const PAGES: usize = 32;

/// A range whose pages are all live, in chunks of this many pages.
fn full(largest: usize) -> Pages<usize> {
    let mut pages = Pages::new(PAGE);
    let bytes = 0..PAGES * PAGE;
    let survey = pages.survey(&bytes).expect("nothing is live");
    pages.begin(&bytes, &survey, survey.missing.clone());
    let chunks = cut(0..PAGES, largest).map(|chunk| (chunk.clone(), chunk.start));
    pages.finish(&bytes, chunks);
    pages
}

fn free(pages: &mut Pages<usize>, bytes: Range<usize>) -> Vec<usize> {
    let gaps: Vec<_> = pages.live().gaps(bytes.clone()).collect();
    let mut unused = Vec::new();
    let mut at = bytes.start;
    for gap in gaps
        .into_iter()
        .chain(core::iter::once(bytes.end..bytes.end))
    {
        if at < gap.start {
            pages.release(&(at..gap.start), &mut unused);
        }
        at = gap.end;
    }
    unused
}

fn live_pages(pages: &Pages<usize>) -> Vec<usize> {
    let live = |page: &usize| pages.live().overlaps(&(page * PAGE..(page + 1) * PAGE));
    (0..PAGES).filter(live).collect()
}

/// Counts that are kept as the books change are those that a walk over them finds.
fn check(pages: &Pages<usize>) -> Result<(), TestCaseError> {
    let live = live_pages(pages);
    prop_assert_eq!(pages.live_pages(), live.len());
    for (first, chunk) in pages.chunks.iter() {
        let own = (first..first + chunk.pages()).filter(|page| live.contains(page));
        prop_assert_eq!(chunk.live_pages as usize, own.count());
    }
    Ok(())
}

proptest! {
    #[test]
    fn a_move_leaves_no_slack_but_what_is_freed_meanwhile(
        shift in 0..4u32,
        before in prop::collection::vec((0..PAGES * PAGE, 1..60usize), 0..12),
        meanwhile in prop::collection::vec((0..PAGES * PAGE, 1..60usize), 0..3),
        comes_back in any::<bool>(),
    ) {
        let mut pages = full(1 << shift);
        let clip = |(at, bytes): (usize, usize)| at..(at + bytes).min(PAGES * PAGE);
        for bytes in before.into_iter().map(clip) {
            free(&mut pages, bytes);
        }
        let parts = pages.parts();
        let moves: Vec<_> = pages.partly_live().collect();
        prop_assert_eq!(moves.iter().map(|chunk| chunk.slack_bytes).sum::<usize>(), parts.slack_bytes);
        for chunk in &moves {
            let live = live_pages(&pages);
            let own = live.iter().copied().filter(|page| (chunk.first..chunk.first + (1 << shift)).contains(page));
            prop_assert_eq!(chunk.pieces.iter().cloned().flatten().collect::<Vec<_>>(), own.collect::<Vec<_>>());
            prop_assert!(chunk.pieces.iter().all(|piece| piece.len() < 1 << shift));
            prop_assert_eq!(pages.depart(chunk.first), Some(chunk.first));
            prop_assert_eq!(pages.depart(chunk.first), None, "a move has it already");
            prop_assert_eq!(pages.partly_live_at(chunk.first), None);
        }
        prop_assert_eq!(pages.parts(), parts, "it counts as before while it moves");
        for bytes in meanwhile.into_iter().map(clip) {
            for first in free(&mut pages, bytes) {
                prop_assert!(moves.iter().all(|chunk| chunk.first != first), "what moves does not retire");
            }
        }
        for chunk in &moves {
            let retired = if comes_back {
                pages.come_back(chunk.first, chunk.first)
            } else {
                pages.arrive(chunk.first, chunk.pieces.iter().map(|piece| (piece.clone(), piece.start)))
            };
            for first in retired {
                prop_assert_eq!(pages.state_of(first), Some(ChunkState::Retiring));
            }
        }
        check(&pages)?;
        let left: usize = pages.partly_live().map(|chunk| chunk.slack_bytes).sum();
        prop_assert_eq!(left, pages.parts().slack_bytes);
        prop_assert!(!pages.is_worked_on());
    }
}

#[test]
fn a_stranded_chunk_is_quarantined_and_its_bytes_have_no_owner() {
    let mut pages = full(4);
    pages.released(&(0..PAGE));
    pages.depart(0);
    pages.strand(0);
    assert_eq!(
        pages.parts(),
        MemoryParts {
            live_page_bytes: (PAGES - 4) * PAGE,
            quarantined_bytes: 4 * PAGE,
            ..MemoryParts::default()
        }
    );
    assert_eq!(pages.live_pages(), PAGES - 1, "they are live all the same");
    assert!(pages.is_stranded(&(3 * PAGE..5 * PAGE)));
    assert!(!pages.is_stranded(&(4 * PAGE..5 * PAGE)));
    assert!(pages.survey(&(0..PAGE)).expect("free").quarantined);
    let released = pages.released(&(PAGE..4 * PAGE));
    assert!(released.is_empty(), "kept to be retried");
    let stranded = pages.parts();
    pages.resume(0);
    assert!(pages.is_worked_on());
    // Out of reach until it is in its place again.
    assert_eq!(pages.parts(), stranded);
    assert!(pages.is_stranded(&(PAGE..2 * PAGE)));
    assert!(pages.survey(&(0..PAGE)).expect("free").busy);
    assert_eq!(pages.come_back(0, 0), [0], "it is unused now");
}

#[test]
fn a_chunk_of_which_bytes_are_being_taken_stays() {
    let mut pages = full(4);
    pages.released(&(0..PAGE));
    let survey = pages.survey(&(0..3)).expect("free");
    pages.begin(&(0..3), &survey, survey.missing.clone());
    assert_eq!(pages.partly_live_at(0), None);
    pages.finish(&(0..3), []);
    assert_eq!(pages.partly_live_at(0), None, "no page of it is slack");
}
