//! Blocks that are handed out, freed and packed.

use crate::common::{manual, turn};
use crate::fixture::{Fixture, PAGE, Shapes};
use cuda_vmm::VmmError;
use cuda_vmm::pool::blocks::{BlockAllocator, BlockError, ReclaimPlan};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use std::collections::BTreeSet;

const BLOCKS: usize = 400;

/// Commits, and lets what is remembered and what sequences hold follow.
fn commit(
    allocator: &BlockAllocator,
    fixture: &mut Fixture,
    sequences: &mut [Vec<usize>],
    plan: &ReclaimPlan,
) {
    allocator.commit(plan, &fixture.stream).expect("true");
    fixture.committed(plan);
    for block in sequences.iter_mut().flatten() {
        if let Ok(at) = plan.moves().binary_search_by_key(block, |(from, _)| *from) {
            *block = plan.moves()[at].1;
        }
    }
}

#[test]
fn sequences_that_come_and_go_keep_their_bytes_and_leave_no_more_than_a_tenth() {
    let _turn = turn();
    for shapes in Shapes::ALL {
        let mut fixture = Fixture::new(shapes, BLOCKS, manual());
        let allocator = BlockAllocator::new(fixture.backing.clone());
        let mut random = SmallRng::seed_from_u64(5);
        let mut sequences: Vec<Vec<usize>> = Vec::new();
        let mut held = BTreeSet::new();
        for round in 0..60 {
            // Busy: sequences of all lengths, until there are no blocks left.
            while let Ok(blocks) = allocator.allocate(random.random_range(1..20)) {
                for block in &blocks {
                    assert!(held.insert(*block), "{block} is handed out twice");
                    fixture.fill(*block);
                }
                sequences.push(blocks);
            }
            // Idle: few are left, anywhere.
            sequences.shuffle(&mut random);
            let kept = random.random_range(5..12);
            for sequence in sequences.drain(kept.min(sequences.len())..) {
                sequence.iter().for_each(|block| {
                    held.remove(block);
                });
                allocator.free(sequence).expect("handed out");
            }
            assert_eq!(allocator.allocated(), held.len());
            if round % 10 != 9 {
                continue;
            }
            // What was freed keeps its bytes until memory is wanted.
            fixture.check();
            let plan = allocator.reclaim_candidates_with_moves(usize::MAX, 1.0, |_| None);
            commit(&allocator, &mut fixture, &mut sequences, &plan);
            held = sequences.iter().flatten().copied().collect();
            assert_eq!(allocator.allocated(), held.len());
            assert!(held.iter().all(|block| allocator.is_allocated(*block)));
            fixture.settle();
            fixture.check();
            let stats = fixture.backing.stats();
            let live_bytes = held.len() * stats.block_bytes;
            // A tenth, and a page for each tensor, as nothing holds less.
            let most = live_bytes + live_bytes / 10 + fixture.backing.tensors().len() * PAGE;
            assert!(
                stats.committed_bytes <= most,
                "{shapes:?}: {live_bytes} live, {stats}"
            );
        }
        drop(allocator);
        fixture.end();
    }
}

#[test]
fn what_fails_hands_nothing_out() {
    let _turn = turn();
    let fixture = Fixture::new(Shapes::Vectors, 64, manual().limit_bytes(4 * PAGE));
    let allocator = BlockAllocator::new(fixture.backing.clone());
    let first = allocator.allocate(20).expect("room");
    assert_eq!(first, (0..20).collect::<Vec<_>>());
    let error = allocator.allocate(13).expect_err("six pages, of four");
    assert!(error.is_out_of_memory(), "{error}");
    let error = allocator.try_allocate(45).expect_err("there are 44");
    let (asked, free, blocks) = (45, 44, 64);
    assert_eq!(
        error,
        VmmError::Block(BlockError::OutOfBlocks {
            asked,
            free,
            blocks
        })
    );
    assert!(!error.is_permanent() && !error.is_retryable());
    assert_eq!(allocator.allocated(), 20);
    assert_eq!(fixture.backing.stats().backed_blocks, 20);
    allocator.free([3, 3, 4]).expect("handed out");
    let error = allocator.free([5, 3]).expect_err("free already");
    assert_eq!(
        error,
        VmmError::Block(BlockError::NotAllocated { block: 3 })
    );
    assert!(allocator.is_allocated(5), "all or none");
    assert_eq!(allocator.allocate(0), Ok(vec![]));
    assert_eq!(
        allocator.allocate(12 + 2).map(|blocks| blocks.len()),
        Ok(14)
    );
    drop(allocator);
    fixture.end();
}

#[test]
fn a_block_handed_out_since_makes_a_plan_stale() {
    let _turn = turn();
    let fixture = Fixture::new(Shapes::Vectors, 32, manual());
    let allocator = BlockAllocator::new(fixture.backing.clone());
    allocator.allocate(32).expect("room");
    allocator.free(0..32).expect("handed out");
    let stale = allocator.reclaim_candidates(1, |_| None);
    let block = stale.evicted()[0];
    let again = allocator.allocate(32).expect("room");
    assert!(again.contains(&block));
    let outcome = allocator.commit(&stale, &fixture.stream);
    assert_eq!(
        outcome,
        Err(VmmError::Block(BlockError::StalePlan { block }))
    );
    assert_eq!(
        (allocator.allocated(), fixture.backing.stats().backed_blocks),
        (32, 32)
    );
    // What was to move, and was freed since, makes it stale too.
    allocator
        .free((0..32).filter(|block| ![0, 20].contains(block)))
        .expect("handed out");
    let stale = allocator.reclaim_candidates_with_moves(1, 1.0, |_| None);
    let (block, _) = stale.moves()[0];
    allocator.free([block]).expect("handed out");
    let outcome = allocator.commit(&stale, &fixture.stream);
    assert_eq!(
        outcome,
        Err(VmmError::Block(BlockError::StalePlan { block }))
    );
    let all = allocator.reclaim_candidates_with_moves(usize::MAX, 1.0, |_| None);
    allocator.commit(&all, &fixture.stream).expect("true");
    assert_eq!(
        (allocator.allocated(), fixture.backing.stats().page_bytes),
        (1, 2 * PAGE)
    );
    drop(allocator);
    fixture.end();
}
