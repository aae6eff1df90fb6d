//! Random operations on a backing against a plain model: which blocks are backed, and every byte of
//! them.

use crate::common::{manual, turn};
use crate::fixture::{Fixture, PAGE, Shapes};
use cuda_vmm::VmmError;
use cuda_vmm::pool::blocks::{BlockError, BlockPin};
use proptest::prelude::*;
use std::collections::BTreeSet;

const BLOCKS: usize = 40;

#[derive(Debug, Clone)]
enum Operation {
    Back(Vec<usize>),
    Unback(Vec<usize>),
    Pin(Vec<usize>),
    Unpin(usize),
    /// With a cost for each block; 0 for none, and moves if there is a cost for them.
    Reclaim {
        pages: usize,
        costs: Vec<u8>,
        move_cost: Option<u8>,
    },
    Settle,
}

fn blocks() -> impl Strategy<Value = Vec<usize>> {
    prop_oneof![
        prop::collection::vec(0..BLOCKS, 0..8),
        (0..BLOCKS, 1..20usize)
            .prop_map(|(first, count)| (first..BLOCKS.min(first + count)).collect()),
    ]
}

fn operation() -> impl Strategy<Value = Operation> {
    let costs = || prop::collection::vec(0..6u8, BLOCKS);
    prop_oneof![
        4 => blocks().prop_map(Operation::Back),
        2 => blocks().prop_map(Operation::Unback),
        1 => blocks().prop_map(Operation::Pin),
        1 => (0..4usize).prop_map(Operation::Unpin),
        3 => (0..20usize, costs(), prop::option::of(0..5u8)).prop_map(|(pages, costs, move_cost)| {
            Operation::Reclaim { pages, costs, move_cost }
        }),
        1 => Just(Operation::Settle),
    ]
}

fn shapes() -> impl Strategy<Value = Shapes> {
    prop::sample::select(Shapes::ALL.to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_backing_does_as_a_plain_model(
        shapes in shapes(),
        limit in prop_oneof![Just(usize::MAX), 8..60usize],
        named in any::<bool>(),
        operations in prop::collection::vec(operation(), 1..30),
    ) {
        let _turn = turn();
        let limit_bytes = limit.saturating_mul(PAGE);
        let mut fixture = Fixture::new(shapes, BLOCKS, manual().limit_bytes(limit_bytes));
        if named {
            fixture.backing.use_stream(&fixture.stream).expect("of this device");
        }
        let mut backed = BTreeSet::new();
        let mut pins: Vec<BlockPin> = Vec::new();
        for operation in operations {
            let pinned: BTreeSet<usize> = pins.iter().flat_map(BlockPin::blocks).collect();
            match operation {
                Operation::Back(blocks) => {
                    let wanted: BTreeSet<_> = blocks.iter().copied().collect();
                    let all: Vec<_> = backed.union(&wanted).copied().collect();
                    let outcome = fixture.backing.back(blocks);
                    // It waits for what retires, so it is refused only where it can never be.
                    if fixture.page_bytes(&all) > limit_bytes {
                        let error = outcome.expect_err("no room");
                        prop_assert!(error.is_out_of_memory(), "{}", error);
                    } else {
                        prop_assert_eq!(outcome, Ok(()));
                        for block in wanted.difference(&backed) {
                            fixture.fill(*block);
                        }
                        backed.extend(wanted);
                    }
                }
                Operation::Unback(blocks) => {
                    let wanted: BTreeSet<_> = blocks.iter().copied().collect();
                    let wrong = wanted.iter().copied().find_map(|block| {
                        match (backed.contains(&block), pinned.contains(&block)) {
                            (false, _) => Some(BlockError::NotBacked { block }),
                            (true, true) => Some(BlockError::Pinned { block }),
                            (true, false) => None,
                        }
                    });
                    match wrong {
                        Some(error) => {
                            prop_assert_eq!(fixture.backing.unback(blocks), Err(VmmError::Block(error)));
                        }
                        None => {
                            fixture.unback(blocks);
                            backed.retain(|block| !wanted.contains(block));
                        }
                    }
                }
                Operation::Pin(blocks) => {
                    let wanted: BTreeSet<_> = blocks.iter().copied().collect();
                    let wrong = wanted.iter().copied().find(|block| !backed.contains(block));
                    match (fixture.backing.pin(blocks), wrong) {
                        (Ok(pin), None) => {
                            prop_assert!(pin.blocks().eq(wanted));
                            pins.push(pin);
                        }
                        (Err(error), Some(block)) => {
                            prop_assert_eq!(error, VmmError::Block(BlockError::NotBacked { block }));
                        }
                        (outcome, wrong) => prop_assert!(false, "{outcome:?}, {wrong:?}"),
                    }
                }
                Operation::Unpin(at) => {
                    if at < pins.len() {
                        drop(pins.swap_remove(at));
                    }
                }
                Operation::Reclaim { pages, costs, move_cost } => {
                    let cost = |block: usize| costs[block].checked_sub(1).map(f64::from);
                    let bytes = pages * PAGE;
                    let plan = match move_cost {
                        Some(move_cost) => fixture.backing
                            .reclaim_candidates_with_moves(bytes, f64::from(move_cost), cost),
                        None => fixture.backing.reclaim_candidates(bytes, cost),
                    };
                    let before: Vec<_> = backed.iter().copied().collect();
                    for block in plan.evicted() {
                        prop_assert!(cost(*block).is_some() && !pinned.contains(block));
                        prop_assert!(backed.remove(block));
                    }
                    for (from, to) in plan.moves() {
                        prop_assert!(!pinned.contains(from) && !pinned.contains(to));
                        prop_assert!(cost(*to).is_some());
                        prop_assert!(backed.remove(from) && backed.contains(to));
                    }
                    let after: Vec<_> = backed.iter().copied().collect();
                    let freed_bytes = fixture.page_bytes(&before) - fixture.page_bytes(&after);
                    prop_assert_eq!(plan.freed_bytes(), freed_bytes);
                    prop_assert_eq!(plan.is_enough(), freed_bytes >= bytes);
                    fixture.commit(&plan);
                }
                Operation::Settle => {
                    fixture.settle();
                    let stats = fixture.backing.stats();
                    prop_assert_eq!(stats.committed_bytes, stats.page_bytes);
                }
            }
            prop_assert!(backed.iter().all(|block| fixture.backing.is_backed(*block)));
            let pinned: BTreeSet<usize> = pins.iter().flat_map(BlockPin::blocks).collect();
            let stats = fixture.backing.stats();
            prop_assert_eq!((stats.backed_blocks, stats.pinned_blocks), (backed.len(), pinned.len()));
            fixture.check();
        }
        drop(pins);
        fixture.end();
    }
}
