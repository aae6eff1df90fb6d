//! Memory made ahead for blocks: where the next ones will be, and not on the stepping thread.

use crate::common::{Simulated, manual, turn};
use crate::fixture::{PAGE, Shapes};
use cuda_vmm::pool::blocks::{BlockAllocator, BlockBacking, BlockError, BlockId, BlockOptions};
use cuda_vmm::sim::{Fault, SimConfig, Simulator};
use cuda_vmm::sys::{CUDA_ERROR_OUT_OF_MEMORY, DriverFunction};
use cuda_vmm::{Engine, EngineOptions, Quota, Stream, VmmError};
use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeSet;

const MEMORY: [DriverFunction; 7] = [
    DriverFunction::cuMemAddressReserve,
    DriverFunction::cuMemAddressFree,
    DriverFunction::cuMemCreate,
    DriverFunction::cuMemRelease,
    DriverFunction::cuMemMap,
    DriverFunction::cuMemUnmap,
    DriverFunction::cuMemSetAccess,
];

/// How many calls that make, map or give back memory are made meanwhile.
fn memory_calls(simulator: &Simulator, act: impl FnOnce()) -> usize {
    simulator.start_trace();
    act();
    let calls = simulator.take_trace();
    calls.iter().filter(|call| MEMORY.contains(call)).count()
}

fn simulated() -> Simulated {
    Simulated::new(SimConfig::new().granularity_bytes(PAGE).unbacked())
}

fn backing(engine: &Engine, shapes: Shapes, blocks: usize, ahead_blocks: usize) -> BlockBacking {
    let name = format!("{shapes:?}");
    let account = engine.account(&name, Quota::new()).expect("an account");
    let options = BlockOptions::new().ahead_blocks_max(ahead_blocks);
    BlockBacking::with_options(&account, shapes.spec(), blocks, PAGE, options).expect("a backing")
}

#[track_caller]
fn check_books(engine: &Engine, simulated: &Simulated) {
    let stats = engine.stats();
    assert_eq!(stats.parts.total_bytes(), stats.committed_bytes, "{stats}");
    assert_eq!(stats.committed_bytes, simulated.books().physical_bytes);
}

/// How an engine hands out blocks.
enum Allocator {
    Packing(BlockAllocator),
    /// One of its own: the lowest free block, or the one freed last.
    Own {
        backing: BlockBacking,
        free: Vec<BlockId>,
        is_sorted: bool,
    },
}

const AHEAD: usize = 256;

impl Allocator {
    fn allocate(&mut self, count: usize) -> cuda_vmm::Result<Vec<BlockId>> {
        match self {
            Self::Packing(allocator) => allocator.allocate(count),
            Self::Own { backing, free, .. } => {
                let blocks = free.split_off(free.len() - count);
                if let Err(error) = backing.back(blocks.iter().copied()) {
                    free.extend(blocks);
                    return Err(error);
                }
                Ok(blocks)
            }
        }
    }

    fn free(&mut self, blocks: Vec<BlockId>) {
        match self {
            Self::Packing(allocator) => allocator.free(blocks).expect("handed out"),
            Self::Own {
                backing,
                free,
                is_sorted,
            } => {
                backing.unback(blocks.iter().copied()).expect("backed");
                free.extend(blocks);
                if *is_sorted {
                    free.sort_unstable_by(|one, other| other.cmp(one));
                }
            }
        }
    }

    fn end_step(&self) {
        if let Self::Own { backing, free, .. } = self {
            backing
                .prefetch(free.iter().rev().copied())
                .expect("there are such");
        }
    }
}

/// One model's sequences: their blocks, and the tokens that each still gets.
struct Model {
    allocator: Allocator,
    sequences: Vec<(Vec<BlockId>, usize)>,
    stream: Stream,
}

const TOKENS: usize = 16;

impl Model {
    /// Each sequence gets a token. Some end, and others begin in their place. Returns how many were
    /// refused their block, and gave up all.
    fn step(&mut self, random: &mut SmallRng, sequences: usize) -> usize {
        let mut refused = 0;
        for index in (0..self.sequences.len()).rev() {
            let (blocks, left) = &mut self.sequences[index];
            *left -= 1;
            let is_done = *left == 0;
            if !is_done && left.is_multiple_of(TOKENS) {
                match self.allocator.allocate(1) {
                    Ok(more) => {
                        blocks.extend(more);
                        continue;
                    }
                    Err(error) => assert!(error.is_out_of_memory(), "{error}"),
                }
                refused += 1;
            } else if !is_done {
                continue;
            }
            let (blocks, _) = self.sequences.swap_remove(index);
            self.allocator.free(blocks);
        }
        while self.sequences.len() < sequences && refused == 0 {
            let Ok(prompt) = self.allocator.allocate(random.random_range(1..4)) else {
                refused += 1;
                break;
            };
            let tokens = random.random_range(1..12 * TOKENS);
            self.sequences.push((prompt, tokens));
        }
        let held = self.sequences.iter().flat_map(|(blocks, _)| blocks);
        let held: Vec<_> = held.collect();
        assert_eq!(
            held.iter().collect::<BTreeSet<_>>().len(),
            held.len(),
            "one owner each"
        );
        self.allocator.end_step();
        refused
    }

    /// Gives back all that no sequence uses.
    fn give_back(&self) {
        if let Allocator::Packing(allocator) = &self.allocator {
            let plan = allocator.reclaim_candidates(usize::MAX, |_| None);
            allocator.commit(&plan, &self.stream).expect("true");
        }
    }
}

fn models(
    engine: &Engine,
    simulated: &Simulated,
    of: impl Fn(BlockBacking) -> Allocator,
) -> Vec<Model> {
    let models = [Shapes::Vectors, Shapes::Mla, Shapes::Rows].map(|shapes| {
        let stream = Stream::new(&simulated.device).expect("a stream");
        let backing = backing(engine, shapes, 2048, AHEAD);
        backing.use_stream(&stream).expect("of this device");
        Model {
            allocator: of(backing),
            sequences: Vec::new(),
            stream,
        }
    });
    models.into()
}

fn packing(backing: BlockBacking) -> Allocator {
    Allocator::Packing(BlockAllocator::new(backing))
}

fn own(is_sorted: bool) -> impl Fn(BlockBacking) -> Allocator {
    move |backing| Allocator::Own {
        free: (0..backing.blocks()).rev().collect(),
        backing,
        is_sorted,
    }
}

/// 128 sequences in three models over many steps; returns the memory calls on the stepping thread.
fn decode(options: EngineOptions, of: impl Fn(BlockBacking) -> Allocator) -> (usize, usize) {
    let simulated = simulated();
    let engine = Engine::new(&simulated.device, options).expect("an engine");
    let mut models = models(&engine, &simulated, of);
    let mut random = SmallRng::seed_from_u64(3);
    let (mut calls, mut refused) = (0, 0);
    for step in 0..160 {
        // The load swings, so that memory goes from model to model.
        for (index, model) in models.iter_mut().enumerate() {
            let busy = (step / 40 + index).is_multiple_of(3);
            let sequences = if busy { 128 } else { 24 }.min(4 * step / (index + 1) + 1);
            let made = memory_calls(&simulated.simulator, || {
                refused += model.step(&mut random, sequences);
                if step % 40 == 39 {
                    model.give_back();
                }
            });
            calls += if step > 0 { made } else { 0 };
            model.stream.synchronize().expect("nothing is queued");
            engine.step();
        }
        check_books(&engine, &simulated);
    }
    drop(models);
    engine.step();
    engine.trim().expect("given back");
    assert_eq!(simulated.books().physical_bytes, 0);
    (calls, refused)
}

#[test]
fn no_step_of_128_sequences_in_three_models_makes_a_memory_call() {
    let _turn = turn();
    assert_eq!(decode(manual(), packing), (0, 0));
    assert_eq!(decode(manual(), own(true)), (0, 0));
    assert_eq!(decode(manual(), own(false)), (0, 0));
    let parked = manual()
        .park_bytes_max(64 * PAGE)
        .cache_bytes_max(64 * PAGE);
    assert_eq!(decode(parked, packing), (0, 0));
    assert_eq!(decode(parked, own(true)), (0, 0));
}

#[test]
fn with_too_little_memory_some_are_refused_and_the_books_add_up() {
    let _turn = turn();
    for limit_pages in [60, 150, 400] {
        let (_, refused) = decode(manual().limit_bytes(limit_pages * PAGE), packing);
        assert!(refused > 0, "{limit_pages}");
        let (_, refused) = decode(manual().limit_bytes(limit_pages * PAGE), own(true));
        assert!(refused > 0, "{limit_pages}");
    }
}

#[derive(Debug, Clone)]
enum Operation {
    Allocate(usize),
    Free(usize),
    GiveBack(usize),
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]
    /// Whatever was handed out and freed before, what is handed out next is there.
    #[test]
    fn the_pages_that_are_made_are_those_that_are_handed_out_next(
        shapes in prop::sample::select(&Shapes::ALL[..]),
        operations in prop::collection::vec(prop_oneof![
            (0..60usize).prop_map(Operation::Allocate),
            (0..1000usize).prop_map(Operation::Free),
            (0..40usize).prop_map(Operation::GiveBack),
        ], 1..24),
    ) {
        let _turn = turn();
        let simulated = simulated();
        let engine = Engine::new(&simulated.device, manual()).expect("an engine");
        let stream = Stream::new(&simulated.device).expect("a stream");
        let allocator = BlockAllocator::new(backing(&engine, shapes, 512, 40));
        let mut held: Vec<BlockId> = Vec::new();
        for operation in operations {
            match operation {
                Operation::Allocate(count) => held.extend(allocator.allocate(count).unwrap_or_default()),
                Operation::Free(seed) => {
                    let (gone, kept): (Vec<_>, Vec<_>) =
                        held.iter().partition(|block| (*block * 7 + seed) % 3 == 0);
                    held = kept;
                    allocator.free(gone).expect("handed out");
                }
                Operation::GiveBack(pages) => {
                    let plan = allocator.reclaim_candidates(pages * PAGE, |_| None);
                    allocator.commit(&plan, &stream).expect("true");
                }
            }
            engine.step();
            // What was retiring goes with the second.
            engine.step();
            check_books(&engine, &simulated);
            if allocator.backing().blocks() - allocator.allocated() < 20 {
                continue;
            }
            // The worker begins again when half is left.
            let mut blocks = Vec::new();
            let calls = memory_calls(&simulated.simulator, || {
                blocks = allocator.allocate(20).expect("room");
            });
            prop_assert_eq!(calls, 0, "for {:?}", blocks);
            allocator.free(blocks).expect("handed out");
        }
    }
}

#[test]
fn named_blocks_are_made_in_their_order_and_no_more_than_may_be() {
    let _turn = turn();
    let simulated = simulated();
    let engine = Engine::new(&simulated.device, manual()).expect("an engine");
    // Sixteen blocks a page, in each of two tensors.
    let backing = backing(&engine, Shapes::Vectors, 256, 32);
    backing.back([40]).expect("room");
    backing.prefetch([200, 41, 7]).expect("there are such");
    // Block 41 shares the page of 40. Page 0 and page 12 are wanted.
    assert_eq!(engine.step().prefetched_bytes, 4 * PAGE);
    for block in [41, 200, 7] {
        let calls = memory_calls(&simulated.simulator, || {
            backing.back([block]).expect("there")
        });
        assert_eq!(calls, 0, "{block}");
    }
    // Only the first 32 count, and the rest is not looked at.
    backing
        .prefetch((64..96).chain([1000]))
        .expect("the first ones");
    assert_eq!(engine.step().prefetched_bytes, 4 * PAGE);
    let (block, blocks) = (256, 256);
    assert_eq!(
        backing.prefetch([3, 256]),
        Err(VmmError::Block(BlockError::Invalid { block, blocks }))
    );
    assert_eq!(engine.step().prefetched_bytes, 0, "the names are as before");
    // Elsewhere: what is ahead of places that are named no more goes.
    backing.prefetch([128]).expect("there is one");
    let report = engine.step();
    assert_eq!(
        (report.drained_bytes, report.prefetched_bytes),
        (4 * PAGE, 2 * PAGE)
    );
    backing.prefetch([]).expect("none");
    engine.step();
    assert_eq!(
        engine.stats().parts.ahead_bytes,
        2 * PAGE,
        "nothing else is wanted"
    );
    check_books(&engine, &simulated);
}

#[test]
fn every_call_of_the_worker_fails_in_turn_and_the_blocks_are_backed_all_the_same() {
    let _turn = turn();
    for nth in 1..=13 {
        let simulated = simulated();
        let engine = Engine::new(&simulated.device, manual()).expect("an engine");
        let allocator = BlockAllocator::new(backing(&engine, Shapes::Mla, 64, 4));
        simulator_fault(&simulated.simulator, nth);
        engine.step();
        simulated.simulator.clear_faults();
        check_books(&engine, &simulated);
        let blocks = allocator.allocate(8).expect("room");
        assert_eq!(blocks, (0..8).collect::<Vec<_>>());
        engine.step();
        check_books(&engine, &simulated);
        assert_eq!(engine.stats().parts.quarantined_bytes, 0);
        let calls = memory_calls(&simulated.simulator, || {
            allocator.allocate(2).expect("there");
        });
        assert_eq!(calls, 0, "the worker made it again, {nth}");
    }
}

fn simulator_fault(simulator: &Simulator, nth: u64) {
    simulator.inject(Fault::nth_call(nth, CUDA_ERROR_OUT_OF_MEMORY));
}
