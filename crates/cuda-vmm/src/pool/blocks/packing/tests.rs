use super::*;
use crate::pool::blocks::reclaim::Reclaim;
use crate::pool::blocks::{ElementSize, TensorSpec};
use crate::sync::Arc;
use proptest::prelude::*;

const PAGE: usize = 64;

fn layout(block_bytes: usize, blocks: usize) -> Layout {
    let byte = ElementSize::new(1).expect("not zero");
    let spec = TensorSpec::new("t", &[block_bytes], byte).expect("small");
    Layout::new(&[spec], blocks, PAGE).expect("small").0
}

fn plan(evicted: Vec<BlockId>, moves: Vec<(BlockId, BlockId)>) -> ReclaimPlan {
    let reclaim = Reclaim {
        evicted,
        moves,
        ..Reclaim::default()
    };
    ReclaimPlan::new(reclaim, 0, 0, Arc::default())
}

#[test]
fn the_fullest_page_with_memory_is_taken_from_first() {
    // Four blocks a page.
    let mut packing = Packing::new(&layout(PAGE / 4, 12));
    assert_eq!(packing.take(7), Ok((0..7).collect()));
    packing.put(&[1, 2, 3, 5].into()).expect("handed out");
    // Page 0 has one block out and page 1 two.
    assert_eq!(packing.take(3), Ok(vec![5, 7, 1]));
}

#[test]
fn a_block_that_was_given_up_is_taken_last_in_its_page() {
    let mut packing = Packing::new(&layout(PAGE / 4, 8));
    packing.take(4).expect("room");
    packing.put(&[0, 2].into()).expect("handed out");
    let plan = plan(vec![0], vec![]);
    packing.begin(&plan).expect("true");
    packing.end(&plan, true);
    assert_eq!(packing.take(3), Ok(vec![2, 0, 4]));
}

#[test]
fn more_than_there_are_cannot_be_had() {
    let mut packing = Packing::new(&layout(PAGE, 3));
    packing.take(2).expect("room");
    let (asked, free, blocks) = (2, 1, 3);
    assert_eq!(
        packing.take(2),
        Err(BlockError::OutOfBlocks {
            asked,
            free,
            blocks
        })
    );
    assert_eq!(packing.taken(), 2);
    assert_eq!(
        packing.put(&[0, 2].into()),
        Err(BlockError::NotAllocated { block: 2 })
    );
    let (block, blocks) = (3, 3);
    assert_eq!(
        packing.put(&[0, 3].into()),
        Err(BlockError::Invalid { block, blocks })
    );
    assert!(packing.is_taken(0), "all or none");
}

#[derive(Debug, Clone)]
enum Operation {
    Take(usize),
    Put(Vec<usize>),
    Commit {
        evicted: Vec<usize>,
        moved: usize,
        is_done: bool,
    },
}

fn operation() -> impl Strategy<Value = Operation> {
    let some = || prop::collection::vec(0..64usize, 0..6);
    prop_oneof![
        3 => (0..8usize).prop_map(Operation::Take),
        3 => some().prop_map(Operation::Put),
        1 => (some(), 0..4usize, any::<bool>()).prop_map(|(evicted, moved, is_done)| {
            Operation::Commit { evicted, moved, is_done }
        }),
    ]
}

/// What a plain model knows of a block: whether it is handed out, and whether it has memory.
type Plain = (bool, bool);

proptest! {
    #[test]
    fn packing_does_as_a_plain_model(
        block_bytes in 5..150usize,
        blocks in 1..48usize,
        operations in prop::collection::vec(operation(), 1..60),
    ) {
        let layout = layout(block_bytes, blocks);
        let class = layout.classes[0];
        let mut packing = Packing::new(&layout);
        let mut model: Vec<Plain> = vec![(false, false); blocks];
        let page_of = |block: usize| class.pages_of(&(block..block + 1)).start;
        for operation in operations {
            match operation {
                Operation::Take(count) => {
                    let free = model.iter().filter(|(taken, _)| !taken).count();
                    let bare: Vec<_> = packing.upcoming_bare(count).into_iter().flatten().collect();
                    let outcome = packing.take(count);
                    if count > free {
                        prop_assert_eq!(outcome, Err(BlockError::OutOfBlocks { asked: count, free, blocks }));
                        continue;
                    }
                    let outcome = outcome.expect("there are enough");
                    prop_assert!(bare.iter().eq(outcome.iter().filter(|block| !model[**block].1)));
                    for block in outcome {
                        let rank = |block: usize| {
                            let page = page_of(block);
                            let of_page = (0..blocks).filter(|other| page_of(*other) == page);
                            let memory = of_page.clone().any(|other| model[other].1);
                            let taken = of_page.filter(|other| model[*other].0).count();
                            (memory, taken, Reverse(page), model[block].1, Reverse(block))
                        };
                        let free = (0..blocks).filter(|block| !model[*block].0);
                        let best = free.max_by_key(|block| rank(*block));
                        prop_assert_eq!(Some(block), best);
                        model[block] = (true, true);
                    }
                }
                Operation::Put(put) => {
                    let put: BTreeSet<_> = put.into_iter().map(|block| block % blocks).collect();
                    let wrong = put.iter().copied().find(|block| !model[*block].0);
                    let outcome = packing.put(&put);
                    match wrong {
                        Some(block) => prop_assert_eq!(outcome, Err(BlockError::NotAllocated { block })),
                        None => {
                            prop_assert_eq!(outcome, Ok(()));
                            put.iter().for_each(|block| model[*block].0 = false);
                        }
                    }
                }
                Operation::Commit { evicted, moved, is_done } => {
                    let with_memory = |taken: bool| (0..blocks).filter({
                        let model = model.clone();
                        move |block| model[*block] == (taken, true)
                    });
                    let moves: Vec<_> = with_memory(true).zip(with_memory(false)).take(moved).collect();
                    let is_moved = |block: usize| moves.iter().any(|(from, to)| [*from, *to].contains(&block));
                    let evicted: BTreeSet<_> = evicted.into_iter().map(|block| block % blocks)
                        .filter(|block| model[*block].1 && !is_moved(*block)).collect();
                    let plan = plan(evicted.iter().copied().collect(), moves.clone());
                    prop_assert_eq!(packing.begin(&plan), Ok(()));
                    for block in evicted.iter().copied().chain(moves.iter().flat_map(|(from, to)| [*from, *to])) {
                        prop_assert_eq!(packing.put(&[block].into()), Err(BlockError::NotAllocated { block }));
                    }
                    packing.end(&plan, is_done);
                    if is_done {
                        evicted.iter().for_each(|block| model[*block] = (false, false));
                        for (from, to) in moves {
                            model[from] = (false, false);
                            model[to] = (true, true);
                        }
                    }
                }
            }
            prop_assert_eq!(packing.taken(), model.iter().filter(|(taken, _)| *taken).count());
            let ready = model.iter().filter(|(taken, has_memory)| !*taken && *has_memory);
            prop_assert_eq!(packing.free_backed(), ready.count());
            for (block, (taken, _)) in model.iter().enumerate() {
                prop_assert_eq!(packing.is_taken(block), *taken);
            }
        }
    }
}
