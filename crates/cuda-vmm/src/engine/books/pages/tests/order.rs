//! In which order chunks are given up, and what is remembered of them.

use super::*;

/// Backs one page at each of these, and parks them in this order.
fn parked(firsts: &[usize]) -> Pages<usize> {
    let mut pages = Pages::new(PAGE);
    for first in firsts {
        back(&mut pages, *first);
    }
    for first in firsts {
        assert_eq!(pages.released(&byte(*first)), [*first]);
        pages.park(*first);
    }
    pages
}

/// One byte of a page.
fn byte(page: usize) -> Range<usize> {
    page * PAGE + 1..page * PAGE + 2
}

fn back(pages: &mut Pages<usize>, page: usize) {
    let survey = pages.survey(&byte(page)).expect("free");
    pages.begin(&byte(page), &survey, survey.missing.clone());
    pages.finish(&byte(page), [(page..page + 1, page)]);
}

#[test]
fn what_was_parked_first_is_first() {
    let mut pages = parked(&[5, 2, 7, 3]);
    assert_eq!(pages.parked().collect::<Vec<_>>(), [5, 2, 7, 3]);
    assert_eq!(pages.first_parked(), Some(5));
    assert!(pages.take_within_chunk(&byte(5)));
    assert_eq!(pages.first_parked(), Some(2));
    assert_eq!(pages.drain(2), Some(2));
    pages.drained(2);
    assert_eq!(pages.first_parked(), Some(7));
    assert_eq!(pages.released(&byte(5)), [5]);
    pages.park(5);
    assert_eq!(pages.parked().collect::<Vec<_>>(), [7, 3, 5]);
}

#[test]
fn the_list_of_parked_chunks_is_tidied_when_most_of_it_is_out_of_date() {
    let mut pages = parked(&[0, 1, 2]);
    let mut longest = 0;
    for _ in 0..1000 {
        assert!(pages.take_within_chunk(&byte(1)));
        pages.released(&byte(1));
        pages.park(1);
        longest = longest.max(pages.counts.maybe_parked().count());
    }
    // 64, and twice those that are parked.
    assert_eq!(longest, 64 + 2 * 3);
    let named: BTreeSet<_> = pages.parked().collect();
    assert_eq!(named, BTreeSet::from([0, 1, 2]));
}

#[test]
fn an_extent_counts_from_behind_the_last_shared_chunk() {
    let mut pages: Pages<usize> = Pages::new(PAGE);
    for page in 0..6 {
        let bytes = page * PAGE..(page + 1) * PAGE;
        let survey = pages.survey(&bytes).expect("free");
        pages.begin(&bytes, &survey, survey.missing.clone());
        pages.finish(&bytes, [(page..page + 1, page)]);
    }
    assert_eq!(pages.extent_bytes(6 * PAGE), 6 * PAGE);
    pages.set_shared(3, true);
    assert_eq!(pages.extent_bytes(6 * PAGE), 2 * PAGE);
    pages.set_shared(1, true);
    assert_eq!(pages.extent_bytes(6 * PAGE), 2 * PAGE, "not the last");
    pages.set_shared(3, false);
    pages.set_shared(1, false);
    assert_eq!(pages.extent_bytes(6 * PAGE), 6 * PAGE);
    pages.set_shared(1, true);
    assert_eq!(
        pages.extent_bytes(6 * PAGE),
        4 * PAGE,
        "those before are gone"
    );
}

#[test]
fn what_is_in_a_chunk_is_known_until_it_is_used() {
    let mut pages = parked(&[0, 1]);
    assert_eq!(pages.contents(0), Contents::Unknown);
    for (first, overwritten) in [(0, true), (1, false)] {
        assert_eq!(pages.drain(first), Some(first));
        assert!(pages.is_in_hand(first));
        assert_eq!(pages.memory(first), None);
        pages.retire_drained(first, first, overwritten);
        assert_eq!(pages.state_of(first), Some(ChunkState::Retiring));
        assert_eq!(pages.memory(first), Some(&first));
        pages.park(first);
    }
    assert_eq!(pages.contents(0), Contents::Clean);
    assert_eq!(pages.contents(1), Contents::Stuck);
    assert!(pages.take_within_chunk(&byte(0)));
    assert_eq!(pages.contents(0), Contents::Unknown);
    pages.begin_ahead(2..3);
    pages.finish_ahead(2, Some((2..3, 2)), true);
    assert_eq!(pages.contents(2), Contents::Clean);
}

#[test]
fn all_memory_is_handed_out_by_whether_the_device_may_use_it() {
    let mut pages = parked(&[0, 1, 2, 3]);
    back(&mut pages, 4);
    assert!(pages.take_within_chunk(&byte(1)));
    assert_eq!(pages.released(&byte(1)), [1]);
    assert_eq!(pages.drain(2), Some(2));
    pages.quarantine(2, 2);
    assert_eq!(pages.take_all(), (vec![1, 4], vec![0, 2, 3]));
    assert_eq!((pages.chunks(), pages.live_pages()), (0, 0));
    assert_eq!(pages.parts(), MemoryParts::default());
}

#[test]
fn a_chunk_made_ahead_is_outside_of_pages_that_it_does_not_touch() {
    let mut pages: Pages<usize> = Pages::new(PAGE);
    for (run, first) in [(4..6, 4), (8..10, 8)] {
        pages.begin_ahead(run.clone());
        pages.finish_ahead(first, Some((run, first)), true);
    }
    assert_eq!(pages.ahead_outside(&(4..10)), None);
    assert_eq!(pages.ahead_outside(&(5..9)), None);
    assert_eq!(pages.ahead_outside(&(6..9)), Some(4));
    assert_eq!(pages.ahead_outside(&(4..8)), Some(8));
    assert_eq!(pages.ahead_outside(&(5..9)), None);
    assert_eq!(pages.chunk_at(4), 4..6);
    assert_eq!(pages.parts().ahead_bytes, 4 * PAGE);
}

#[test]
fn a_survey_says_what_is_worked_on_and_what_others_still_leave() {
    let mut pages = parked(&[0, 1, 2]);
    assert_eq!(pages.drain(0), Some(0));
    let survey = pages.survey(&(0..PAGE)).expect("free");
    assert!(survey.busy && !survey.is_there());
    assert_eq!(pages.parts().retiring_bytes, PAGE, "it is being unmapped");
    let survey = pages.survey(&(PAGE..3 * PAGE)).expect("free");
    assert!(!survey.busy && survey.is_there());
    assert_eq!(survey.parked, [1, 2]);
    pages.set_shared(1, true);
    assert_eq!(pages.leaving().collect::<Vec<_>>(), [1]);
    let survey = pages.survey(&(PAGE..3 * PAGE)).expect("free");
    assert_eq!((survey.leaving, survey.parked), (vec![1], vec![2]));
}

#[test]
fn pages_that_are_being_made_are_pending_and_backed_by_no_chunk_that_is_done() {
    let mut pages: Pages<usize> = Pages::new(PAGE);
    let bytes = 0..2 * PAGE;
    let survey = pages.survey(&bytes).expect("free");
    pages.begin(&bytes, &survey, survey.missing.clone());
    assert!(pages.is_any_pending() && pages.is_worked_on() && pages.is_in_hand(0));
    assert_eq!(pages.parts().filling_bytes, 2 * PAGE);
    assert!(pages.has_taken(&(PAGE..PAGE + 1)) && !pages.is_within_backed(&bytes));
    assert!(!pages.are_bare(&(0..1)) && pages.are_bare(&(2..4)));
    assert!(
        pages
            .abort(&bytes, &survey, survey.missing.clone(), [])
            .is_empty()
    );
    assert!(!pages.is_any_pending() && pages.are_bare(&(0..4)));
}

/// Backs all of some pages by one chunk, with some bytes live.
fn chunk(pages: &mut Pages<usize>, of_chunk: Range<usize>, live: &[Range<usize>]) {
    let bytes = of_chunk.start * PAGE..of_chunk.end * PAGE;
    let survey = pages.survey(&bytes).expect("free");
    pages.begin(&bytes, &survey, survey.missing.clone());
    pages.finish(&bytes, [(of_chunk.clone(), of_chunk.start)]);
    for bytes in live {
        assert!(pages.live().contains(bytes));
    }
    let gaps: Vec<_> = {
        let mut kept = Intervals::default();
        live.iter().for_each(|bytes| kept.insert(bytes.clone()));
        kept.gaps(bytes).collect()
    };
    for gap in gaps {
        assert_eq!(pages.released(&gap), [0_usize; 0]);
    }
}

#[test]
fn pages_that_a_neighbour_keeps_live_count_once() {
    let mut pages = Pages::new(PAGE);
    // The first page is live to its end, the third in its middle.
    chunk(&mut pages, 0..4, &[0..PAGE, 2 * PAGE + 3..2 * PAGE + 5]);
    assert_eq!(pages.live_pages(), 2);
    assert!(pages.take_within_chunk(&(PAGE..PAGE + 2)));
    assert_eq!(pages.live_pages(), 3);
    assert!(pages.take_within_chunk(&(PAGE + 3..PAGE + 4)));
    assert_eq!(pages.live_pages(), 3);
    assert!(pages.take_within_chunk(&(2 * PAGE..2 * PAGE + 2)));
    assert_eq!(pages.live_pages(), 3);
    assert!(pages.take_within_chunk(&(2 * PAGE + 6..4 * PAGE)));
    assert_eq!(pages.live_pages(), 4);
    // A page that ends at one that is live.
    chunk(
        &mut pages,
        4..8,
        core::slice::from_ref(&(6 * PAGE..7 * PAGE)),
    );
    assert!(pages.take_within_chunk(&(5 * PAGE..6 * PAGE)));
    assert_eq!(pages.live_pages(), 4 + 2);
}

#[test]
fn a_chunk_that_is_about_to_be_used_at_its_end_does_not_retire() {
    let mut pages = Pages::new(PAGE);
    chunk(
        &mut pages,
        4..8,
        core::slice::from_ref(&(4 * PAGE..5 * PAGE)),
    );
    let taken = 7 * PAGE..8 * PAGE;
    let survey = pages.survey(&taken).expect("free");
    pages.begin(&taken, &survey, []);
    assert_eq!(pages.released(&(4 * PAGE..5 * PAGE)), [0_usize; 0]);
    pages.finish(&taken, []);
    assert_eq!(pages.released(&taken), [4]);
}

#[test]
fn a_parked_page_that_another_is_about_to_use_is_not_parked_by_one_that_fails() {
    let mut pages = parked(&[0]);
    let failing = pages.survey(&(4..20)).expect("free");
    assert_eq!(failing.parked, [0]);
    pages.begin(&(4..20), &failing, failing.missing.clone());
    let other = pages.survey(&(0..3)).expect("free");
    pages.begin(&(0..3), &other, []);
    assert!(
        pages
            .abort(&(4..20), &failing, failing.missing.clone(), [])
            .is_empty()
    );
    assert_eq!(pages.state_of(0), Some(ChunkState::Backed));
    pages.finish(&(0..3), []);
    assert_eq!(pages.released(&(0..3)), [0]);
}

#[test]
fn a_shared_chunk_moves_to_memory_of_the_ranges_own() {
    let mut pages = Pages::new(PAGE);
    chunk(&mut pages, 0..4, &[0..PAGE, 2 * PAGE..4 * PAGE]);
    assert_eq!(pages.to_make_private(0), None, "it is its own");
    pages.set_shared(0, true);
    let moved = pages.to_make_private(0).expect("it is shared");
    assert_eq!(moved.pieces, [0..1, 2..4]);
    assert_eq!((moved.live_page_bytes, moved.slack_bytes), (3 * PAGE, PAGE));
    assert_eq!(pages.depart(0), Some(0));
    assert_eq!(pages.to_make_private(0), None, "it moves already");
    assert_eq!(pages.released(&(0..PAGE)), [0_usize; 0]);
    assert_eq!(pages.arrive(0, [(0..1, 0), (2..4, 2)]), [0]);
    let expected = MemoryParts {
        live_page_bytes: 2 * PAGE,
        retiring_bytes: PAGE,
        ..MemoryParts::default()
    };
    assert_eq!((pages.parts(), pages.shared_pages()), (expected, 0));
}

#[test]
fn pages_made_ahead_are_being_made_until_they_are_there() {
    let mut pages: Pages<usize> = Pages::new(PAGE);
    pages.begin_ahead(2..5);
    assert_eq!(pages.parts().filling_bytes, 3 * PAGE);
    assert!(pages.survey(&(2 * PAGE..3 * PAGE)).expect("free").busy);
    pages.finish_ahead(2, None, true);
    assert_eq!(pages.parts(), MemoryParts::default());
}
