use super::*;
use crate::pool::blocks::{ElementSize, TensorSpec};
use proptest::prelude::*;

const PAGE: usize = 64;

fn layout(block_bytes: &[usize], blocks: usize) -> Layout {
    let byte = ElementSize::new(1).expect("not zero");
    let spec = |bytes: &usize| TensorSpec::new("t", &[*bytes], byte).expect("small");
    let specs: Vec<_> = block_bytes.iter().map(spec).collect();
    Layout::new(&specs, blocks, PAGE).expect("small").0
}

fn costs(costs: &[Option<f64>]) -> Vec<Candidate> {
    let held = |evict: &Option<f64>| Candidate::Held { evict: *evict };
    costs.iter().map(held).collect()
}

/// Whole pages that no block is in, of those that some block was in, in bytes of all tensors.
fn emptied_bytes(layout: &Layout, before: &[bool], after: &[bool]) -> usize {
    let mut bytes = 0;
    for class in &layout.classes {
        for page in 0..class.pages() {
            let held = |blocks: &[bool]| class.blocks_of(page).any(|block| blocks[block]);
            if held(before) && !held(after) {
                bytes += class.page_bytes();
            }
        }
    }
    bytes
}

#[test]
fn the_cheapest_pages_go_first() {
    // Two blocks a page.
    let layout = layout(&[PAGE / 2], 6);
    let candidates = costs(&[Some(1.0), Some(1.0), None, Some(0.0), Some(0.5), Some(1.0)]);
    let chosen = reclaim(&layout, &candidates, 1, None);
    assert_eq!(chosen.evicted, [4, 5]);
    assert_eq!((chosen.freed_bytes, chosen.cost), (PAGE, 1.5));
    let chosen = reclaim(&layout, &candidates, usize::MAX, None);
    assert_eq!(chosen.evicted, [0, 1, 4, 5], "the page of 2 and 3 stays");
    assert_eq!(chosen.freed_bytes, 2 * PAGE);
}

#[test]
fn what_is_dear_moves_where_there_is_room() {
    let layout = layout(&[PAGE / 2], 6);
    let candidates = costs(&[None, Some(0.0), None, None, None, Some(0.0)]);
    let chosen = reclaim(&layout, &candidates, usize::MAX, Some(1.0));
    assert_eq!((chosen.evicted, chosen.moves), (vec![5], vec![(4, 1)]));
    assert_eq!((chosen.freed_bytes, chosen.cost), (PAGE, 1.0));
}

#[test]
fn where_room_is_short_what_costs_least_is_evicted() {
    // Room for four blocks in a page, and one place to move to, in a page that stays.
    let layout = layout(&[PAGE / 4], 8);
    let mut candidates = costs(&[
        Some(7.0),
        Some(9.0),
        Some(8.0),
        None,
        Some(0.0),
        None,
        None,
        None,
    ]);
    candidates[3] = Candidate::Absent;
    candidates[5] = Candidate::Fixed;
    let chosen = reclaim(&layout, &candidates, usize::MAX, Some(1.0));
    assert_eq!((chosen.evicted, chosen.moves), (vec![0, 2], vec![(1, 4)]));
    assert_eq!((chosen.freed_bytes, chosen.cost), (PAGE, 16.0));
}

#[test]
fn room_is_kept_for_what_is_dearer_to_evict_than_to_move() {
    // Pages of two blocks: the first would empty at no cost, and then the third at 10.
    let layout = layout(&[PAGE / 2], 6);
    let mut candidates = costs(&[Some(0.0), Some(0.0), None, None, Some(10.0), None]);
    (candidates[3], candidates[5]) = (Candidate::Absent, Candidate::Absent);
    let chosen = reclaim(&layout, &candidates, usize::MAX, Some(1.0));
    assert_eq!((chosen.evicted, chosen.moves.len()), (vec![], 2));
    assert_eq!((chosen.freed_bytes, chosen.cost), (2 * PAGE, 2.0));
}

#[test]
fn a_block_of_many_pages_frees_them_all() {
    let layout = layout(&[3 * PAGE, 8], 4);
    let candidates = costs(&[Some(1.0), None, Some(3.0), None]);
    let chosen = reclaim(&layout, &candidates, PAGE, None);
    assert_eq!((chosen.evicted, chosen.freed_bytes), (vec![0], 3 * PAGE));
}

fn candidate() -> impl Strategy<Value = Candidate> {
    prop_oneof![
        1 => Just(Candidate::Absent),
        1 => Just(Candidate::Fixed),
        3 => Just(Candidate::Held { evict: None }),
        3 => Just(Candidate::Held { evict: Some(0.0) }),
        3 => (1..20u32).prop_map(|cost| Candidate::Held { evict: Some(f64::from(cost)) }),
    ]
}

proptest! {
    #[test]
    fn a_plan_does_what_it_says_and_no_more(
        block_bytes in prop::collection::vec(prop_oneof![1..40usize, 40..300usize], 1..4),
        candidates in prop::collection::vec(candidate(), 1..60),
        pages in prop_oneof![3 => 0..30usize, 1 => Just(usize::MAX / PAGE)],
        move_cost in prop_oneof![Just(None), (0..8u32).prop_map(|cost| Some(f64::from(cost)))],
    ) {
        let layout = layout(&block_bytes, candidates.len());
        let bytes = pages * PAGE;
        let chosen = reclaim(&layout, &candidates, bytes, move_cost);
        let before: Vec<_> = candidates.iter().map(|found| *found != Candidate::Absent).collect();
        let mut after = before.clone();
        let (mut cost, mut leaving) = (0.0, Vec::new());
        for block in &chosen.evicted {
            let Candidate::Held { evict: Some(price) } = candidates[*block] else {
                return Err(TestCaseError::fail(format!("evicts {block}")));
            };
            cost += price;
            prop_assert!(core::mem::replace(&mut after[*block], false), "{block} twice");
            leaving.push(*block);
        }
        let mut targets = BTreeSet::new();
        for (from, to) in &chosen.moves {
            let Candidate::Held { .. } = candidates[*from] else {
                return Err(TestCaseError::fail(format!("moves {from}")));
            };
            let move_cost = move_cost.expect("moves only where they have a cost");
            cost += move_cost;
            prop_assert!(core::mem::replace(&mut after[*from], false), "{from} twice");
            leaving.push(*from);
            let Candidate::Held { evict: Some(price) } = candidates[*to] else {
                return Err(TestCaseError::fail(format!("moves into {to}")));
            };
            cost += price;
            prop_assert!(targets.insert(*to));
        }
        prop_assert!(targets.iter().all(|to| after[*to]), "what is moved into stays");
        prop_assert_eq!(emptied_bytes(&layout, &before, &after), chosen.freed_bytes);
        prop_assert!((chosen.cost - cost).abs() < 1e-9);
        // No less than the first search finds, and at no greater cost.
        let first = Search::new(&layout, &candidates, move_cost, false).run(bytes);
        prop_assert!(chosen.freed_bytes >= first.freed_bytes);
        prop_assert!(chosen.freed_bytes > first.freed_bytes || chosen.cost <= first.cost);
        for (class, emptied) in layout.classes.iter().zip(&chosen.pages) {
            let unique: BTreeSet<_> = emptied.iter().collect();
            prop_assert_eq!(unique.len(), emptied.len());
            for page in emptied {
                prop_assert!(class.blocks_of(*page).all(|block| !after[block]));
            }
        }
        // Nothing goes in vain.
        for block in leaving {
            let mut classes = layout.classes.iter().zip(&chosen.pages);
            prop_assert!(classes.any(|(class, pages)| {
                class.pages_of(&(block..block + 1)).any(|page| pages.contains(&page))
            }), "{block} empties nothing");
        }
        // It finds what evicting alone can free.
        let is_evictable = |found: &Candidate| matches!(found, Candidate::Held { evict: Some(_) });
        let all = candidates.iter().zip(&before).map(|(found, held)| *held && !is_evictable(found));
        let most = emptied_bytes(&layout, &before, &all.collect::<Vec<_>>());
        prop_assert!(chosen.freed_bytes >= bytes.min(most), "{} of {most}", chosen.freed_bytes);
    }

    #[test]
    fn of_equal_pages_the_cheapest_are_taken(prices in prop::collection::vec(0..50u32, 1..30), pages in 1..30usize) {
        // One block a page: what is cheapest is plain.
        let layout = layout(&[PAGE], prices.len());
        let candidates: Vec<_> = prices.iter().map(|price| Some(f64::from(*price))).collect();
        let chosen = reclaim(&layout, &costs(&candidates), pages * PAGE, None);
        let mut sorted = prices.clone();
        sorted.sort_unstable();
        let least: u32 = sorted.iter().take(pages).sum();
        prop_assert_eq!(chosen.cost, f64::from(least));
        prop_assert_eq!(chosen.freed_bytes, pages.min(prices.len()) * PAGE);
    }
}
