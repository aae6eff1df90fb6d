//! The books of a range against the plainest account of the same facts.

use super::*;
use model::Model;
use proptest::prelude::*;
use std::collections::BTreeSet;

mod asked;
mod model;
mod order;

const PAGE: usize = 8;
const PAGES: usize = 24;
const CAPACITY: usize = PAGE * PAGES - 3;

impl<M> Pages<M> {
    /// Ends the life of live bytes. Returns the chunks that are unused now.
    pub(super) fn released(&mut self, bytes: &Range<usize>) -> Vec<usize> {
        let mut unused = Vec::new();
        self.release(bytes, &mut unused);
        unused
    }
}

#[derive(Debug, Clone)]
enum Step {
    Ahead {
        page: usize,
        fails: bool,
        stuck: bool,
    },
    Allocate {
        at: usize,
        bytes: usize,
        fails: bool,
        stuck: bool,
        /// Whether what uses retiring chunks comes after the device's work.
        follows: bool,
    },
    Release {
        at: usize,
        bytes: usize,
    },
    /// Memory of another range at pages that nothing backs.
    Adopt {
        page: usize,
        pages: usize,
        fails: bool,
        stuck: bool,
    },
    /// The memory of a chunk is shared, or is no longer.
    SetShared {
        page: usize,
        shared: bool,
    },
    Park(usize),
    Drain {
        page: usize,
        refused: bool,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..CAPACITY, 1..40usize, prop::bool::weighted(0.2), any::<bool>(), any::<bool>())
            .prop_map(|(at, bytes, fails, stuck, follows)| Step::Allocate { at, bytes, fails, stuck, follows }),
        4 => (0..CAPACITY, 1..40usize).prop_map(|(at, bytes)| Step::Release { at, bytes }),
        2 => (0..PAGES).prop_map(Step::Park),
        2 => (0..PAGES, 1..4usize, prop::bool::weighted(0.2), any::<bool>())
            .prop_map(|(page, pages, fails, stuck)| Step::Adopt { page, pages, fails, stuck }),
        2 => (0..PAGES, any::<bool>()).prop_map(|(page, shared)| Step::SetShared { page, shared }),
        1 => (0..PAGES, prop::bool::weighted(0.2), any::<bool>())
            .prop_map(|(page, fails, stuck)| Step::Ahead { page, fails, stuck }),
        2 => (0..PAGES, prop::bool::weighted(0.2)).prop_map(|(page, refused)| Step::Drain { page, refused }),
    ]
}

proptest! {
    #[test]
    fn it_agrees_with_a_plain_model(steps in prop::collection::vec(step(), 1..120), largest in 0..3u32, grows in any::<bool>(), at_once in any::<bool>()) {
        let mut pages: Pages<usize> = Pages::new(PAGE);
        let mut model = Model { live: [false; CAPACITY], backing: [None; PAGES], ahead: BTreeSet::new(), shared: BTreeSet::new() };
        for step in steps {
            match step {
                Step::Allocate { at, bytes, fails, stuck, follows } => {
                    let range = at..(at + bytes).min(CAPACITY);
                    let taken = range.clone().any(|byte| model.live[byte]);
                    let Some(survey) = pages.survey(&range) else {
                        prop_assert!(taken);
                        continue;
                    };
                    prop_assert!(!taken);
                    let touched = range.start / PAGE..range.end.div_ceil(PAGE);
                    let missing: Vec<_> = touched.clone().filter(|page| model.backing[*page].is_none()).collect();
                    prop_assert_eq!(survey.missing.iter().cloned().flatten().collect::<Vec<_>>(), missing);
                    let any = |is: &dyn Fn(usize, ChunkState) -> bool| {
                        touched.clone().any(|page| model.backing[page].is_some_and(|(first, state)| is(first, state)))
                    };
                    let shared = |first: &usize| model.shared.contains(first);
                    let has = |wanted| any(&|first, state| state == wanted && !shared(&first));
                    let is_left = |state| [ChunkState::Retiring, ChunkState::Parked].contains(&state);
                    prop_assert_eq!(survey.shared, any(&|first, state| state == ChunkState::Backed && shared(&first)));
                    prop_assert_eq!(!survey.leaving.is_empty(), any(&|first, state| is_left(state) && shared(&first)));
                    prop_assert!(survey.leaving.iter().all(shared));
                    prop_assert_eq!(!survey.retiring.is_empty(), has(ChunkState::Retiring));
                    prop_assert_eq!(survey.quarantined, any(&|_, state| state == ChunkState::Quarantined));
                    prop_assert_eq!(!survey.parked.is_empty(), has(ChunkState::Parked));
                    model.check_survey(&survey, &touched)?;
                    if survey.shared || !survey.leaving.is_empty() {
                        prop_assert!(!survey.is_there());
                        let whole = model.whole_chunk(&touched);
                        if whole.is_some_and(|(first, _)| shared(&first)) {
                            prop_assert!(!pages.take_within_chunk(&range));
                        }
                        continue;
                    }
                    let whole = model.whole_chunk(&touched);
                    let backing = [ChunkState::Backed, ChunkState::Parked];
                    if at_once && whole.is_some_and(|(_, state)| backing.contains(&state)) {
                        prop_assert!(pages.take_within_chunk(&range));
                        for entry in model.backing.iter_mut().flatten().filter(|entry| Some(entry.0) == whole.map(|(first, _)| first)) {
                            entry.1 = ChunkState::Backed;
                        }
                        model.ahead.remove(&whole.map_or(PAGES, |(first, _)| first));
                        range.for_each(|byte| model.live[byte] = true);
                        model.check(&mut pages)?;
                        continue;
                    }
                    if whole.is_none() {
                        prop_assert!(!pages.take_within_chunk(&range));
                    }
                    if (!survey.retiring.is_empty() && !follows) || survey.quarantined {
                        continue;
                    }
                    if survey.missing.is_empty() && !fails && grows {
                        pages.take(&range, &survey);
                        model.taken(&survey);
                        range.for_each(|byte| model.live[byte] = true);
                        model.check(&mut pages)?;
                        continue;
                    }
                    let mut runs = survey.missing.clone();
                    if let Some(last) = runs.last_mut() {
                        // An extent that grows takes pages beyond, as far as there is nothing.
                        let end = pages.next_chunk(last.end, PAGES);
                        let nothing = (last.end..PAGES).take_while(|page| model.backing[*page].is_none()).count();
                        prop_assert_eq!(end, last.end + nothing);
                        if grows {
                            last.end = crate::engine::books::policy::grown_end(last, 1 << largest, end);
                        }
                    }
                    pages.begin(&range, &survey, runs.clone());
                    let cut: Vec<_> = runs.iter().flat_map(|run| crate::engine::books::policy::cut(run.clone(), 1 << largest)).collect();
                    if fails {
                        let left: Vec<_> = cut.into_iter().take(usize::from(stuck)).collect();
                        let orphans = pages.abort(&range, &survey, runs, left.iter().map(|chunk| (chunk.clone(), chunk.start)));
                        prop_assert_eq!(orphans, survey.retiring, "as it was");
                        for chunk in left {
                            for page in chunk.clone() { model.backing[page] = Some((chunk.start, ChunkState::Quarantined)); }
                        }
                    } else {
                        pages.finish(&range, cut.iter().map(|chunk| (chunk.clone(), chunk.start)));
                        for chunk in cut {
                            for page in chunk.clone() { model.backing[page] = Some((chunk.start, ChunkState::Backed)); }
                        }
                        model.taken(&survey);
                        range.for_each(|byte| model.live[byte] = true);
                    }
                }
                Step::Release { at, bytes } => {
                    let range = at..(at + bytes).min(CAPACITY);
                    let all = range.clone().all(|byte| model.live[byte]);
                    prop_assert_eq!(pages.live().contains(&range), all);
                    if all {
                        pages.released(&range);
                        range.for_each(|byte| model.live[byte] = false);
                        model.retire_unused();
                    }
                }
                Step::Adopt { page, pages: count, fails, stuck } => {
                    let run = page..(page + count).min(CAPACITY / PAGE);
                    let is_bare = run.clone().all(|page| model.backing[page].is_none());
                    if run.is_empty() {
                        continue;
                    }
                    prop_assert_eq!(pages.are_bare(&run), is_bare);
                    if !is_bare {
                        continue;
                    }
                    let bytes = run.start * PAGE..run.end * PAGE;
                    pages.begin_sharing(run.clone());
                    prop_assert!(pages.is_worked_on() && pages.is_in_hand(page));
                    prop_assert_eq!(pages.survey(&bytes), None, "it is about to be live");
                    let state = match (fails, stuck) {
                        (false, _) => Some(ChunkState::Backed),
                        (true, true) => Some(ChunkState::Quarantined),
                        (true, false) => None,
                    };
                    match fails {
                        false => pages.finish_sharing(page, page),
                        true => pages.abort_sharing(page, stuck.then_some(page)),
                    }
                    if let Some(state) = state {
                        run.for_each(|at| model.backing[at] = Some((page, state)));
                        model.shared.insert(page);
                    }
                    bytes.filter(|_| !fails).for_each(|byte| model.live[byte] = true);
                }
                Step::SetShared { page, shared } => {
                    let is_chunk = model.backing[page].is_some_and(|(first, _)| first == page);
                    if is_chunk && !model.ahead.contains(&page) {
                        pages.set_shared(page, shared);
                        match shared {
                            true => _ = model.shared.insert(page),
                            false => _ = model.shared.remove(&page),
                        }
                    }
                    prop_assert_eq!(pages.is_shared(page), model.shared.contains(&page));
                    let whole = |first: &usize| {
                        let of_chunk = (0..PAGES).filter(|page| model.backing[*page] == Some((*first, ChunkState::Backed)));
                        let mut bytes = of_chunk.flat_map(|page| page * PAGE..(page + 1) * PAGE).peekable();
                        bytes.peek().is_some() && bytes.all(|byte| byte < CAPACITY && model.live[byte])
                    };
                    let firsts = pages.whole_chunks(&(0..CAPACITY), 0).map(|chunk| chunk.start);
                    prop_assert!(firsts.eq((0..PAGES).filter(whole)));
                }
                Step::Park(page) => {
                    pages.park(page);
                    for entry in model.backing.iter_mut().flatten().filter(|(first, state)| *first == page && *state == ChunkState::Retiring) {
                        entry.1 = ChunkState::Parked;
                    }
                }
                Step::Ahead { page, fails, stuck } => {
                    let missing = (page..PAGES).find(|page| model.backing[*page].is_none());
                    prop_assert_eq!(pages.first_missing(page..PAGES), missing);
                    if missing != Some(page) {
                        continue;
                    }
                    pages.begin_ahead(page..page + 1);
                    let left = (!fails || stuck).then_some((page..page + 1, page));
                    pages.finish_ahead(page, left, !fails);
                    if !fails {
                        model.backing[page] = Some((page, ChunkState::Parked));
                        model.ahead.insert(page);
                    } else if stuck {
                        model.backing[page] = Some((page, ChunkState::Quarantined));
                    }
                }
                Step::Drain { page, refused } => {
                    let window = PAGES / 4..PAGES / 2;
                    let outside = model.ahead.iter().any(|page| !window.contains(page));
                    prop_assert_eq!(pages.ahead_outside(&window).is_some(), outside);
                    prop_assert!(pages.ahead().eq(model.ahead.iter().copied()));
                    let idle = model.backing[page].is_some_and(|(first, state)| first == page && matches!(state, ChunkState::Parked | ChunkState::Quarantined));
                    let memory = pages.drain(page);
                    prop_assert_eq!(memory, idle.then_some(page));
                    if memory.is_some() {
                        model.ahead.remove(&page);
                        if !refused {
                            model.shared.remove(&page);
                        }
                        if refused { pages.quarantine(page, page) } else { pages.drained(page) }
                        for entry in model.backing.iter_mut().filter(|entry| entry.is_some_and(|(first, _)| first == page)) {
                            *entry = refused.then_some((page, ChunkState::Quarantined));
                        }
                    }
                }
            }
            model.check(&mut pages)?;
        }
    }
}

#[test]
fn two_tokens_share_a_page_and_the_page_stays_until_both_are_gone() {
    let mut pages: Pages<()> = Pages::new(PAGE);
    let survey = pages.survey(&(0..3)).expect("free");
    pages.begin(&(0..3), &survey, survey.missing.clone());
    pages.finish(&(0..3), [(0..1, ())]);
    let survey = pages.survey(&(3..6)).expect("free");
    assert_eq!(survey, Survey::default(), "nothing is missing");
    pages.begin(&(3..6), &survey, survey.missing.clone());
    pages.finish(&(3..6), []);
    assert_eq!(pages.live_pages(), 1);
    assert!(pages.released(&(0..3)).is_empty());
    assert_eq!(pages.released(&(3..6)), [0]);
    assert_eq!(pages.live_pages(), 0);
}

#[test]
fn a_neighbour_freed_during_a_filling_that_fails_leaves_an_orphan_to_retire() {
    let mut pages: Pages<()> = Pages::new(PAGE);
    let first = pages.survey(&(0..3)).expect("free");
    pages.begin(&(0..3), &first, first.missing.clone());
    pages.finish(&(0..3), [(0..1, ())]);
    let second = pages.survey(&(3..20)).expect("free");
    pages.begin(&(3..20), &second, second.missing.clone());
    assert_eq!(pages.released(&(0..3)), [], "page 0 is about to be used");
    assert_eq!(
        pages.abort(&(3..20), &second, second.missing.clone(), []),
        [0]
    );
    assert_eq!(pages.state_of(0), Some(ChunkState::Retiring));
}

#[test]
fn placing_is_first_fit_and_aligned() {
    let mut pages: Pages<()> = Pages::new(PAGE);
    let survey = pages.survey(&(4..9)).expect("free");
    pages.begin(&(4..9), &survey, survey.missing.clone());
    assert_eq!(pages.place(4, 4, 40), Ok(0));
    assert_eq!(pages.place(5, 4, 40), Ok(12));
    assert_eq!(pages.place(29, 4, 40), Err(31));
}

#[test]
fn a_parked_page_that_a_neighbour_used_during_a_failed_filling_retires() {
    let mut pages: Pages<()> = Pages::new(PAGE);
    let first = pages.survey(&(0..3)).expect("free");
    pages.begin(&(0..3), &first, first.missing.clone());
    pages.finish(&(0..3), [(0..1, ())]);
    assert_eq!(pages.released(&(0..3)), [0]);
    pages.park(0);
    // One thread begins over the parked page and a missing one; another uses the page and frees it.
    let failing = pages.survey(&(4..20)).expect("free");
    assert_eq!(failing.parked, [0]);
    pages.begin(&(4..20), &failing, failing.missing.clone());
    let neighbour = pages.survey(&(0..3)).expect("free");
    pages.begin(&(0..3), &neighbour, neighbour.missing.clone());
    pages.finish(&(0..3), []);
    assert_eq!(pages.released(&(0..3)), [], "page 0 is about to be used");
    assert_eq!(
        pages.abort(&(4..20), &failing, failing.missing.clone(), []),
        [0]
    );
    assert_eq!(
        pages.state_of(0),
        Some(ChunkState::Retiring),
        "not parked: the device may be using it"
    );
}
