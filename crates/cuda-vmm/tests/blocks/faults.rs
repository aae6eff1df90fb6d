//! Every driver call of every operation fails in turn, and pairs of them, so that a call fails with
//! its undo.

use crate::common::{manual, turn};
use crate::fixture::{Fixture, PAGE, Shapes};
use cuda_vmm::Result;
use cuda_vmm::pool::blocks::{BlockBacking, ReclaimPlan};
use cuda_vmm::sim::Fault;
use cuda_vmm::sys::{CUDA_ERROR_OPERATING_SYSTEM, CUDA_ERROR_OUT_OF_MEMORY, CUresult};

const BLOCKS: usize = 24;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    New,
    Back,
    Unback,
    Evict,
    Move,
}

const ALL: [Operation; 5] = [
    Operation::New,
    Operation::Back,
    Operation::Unback,
    Operation::Evict,
    Operation::Move,
];

fn plan(fixture: &Fixture, operation: Operation) -> ReclaimPlan {
    let backing = &fixture.backing;
    match operation {
        Operation::Evict => backing.reclaim_candidates(3 * PAGE, |_| Some(1.0)),
        _ => {
            // Blocks of no value, into which the others move.
            let cost = |block: usize| block.is_multiple_of(2).then_some(0.0);
            backing.reclaim_candidates_with_moves(3 * PAGE, 1.0, cost)
        }
    }
}

/// Operates with the calls of these numbers failing; says how many calls it made.
fn run(operation: Operation, failing: &[u64], code: CUresult) -> u64 {
    let what = format!("{operation:?}, calls {failing:?} failing with {code}");
    let mut fixture = Fixture::new(Shapes::Mla, BLOCKS, manual());
    fixture
        .backing
        .use_stream(&fixture.stream)
        .expect("of this device");
    fixture.back(2..12);
    let simulator = fixture.simulated.simulator.clone();
    let plan = plan(&fixture, operation);
    simulator.start_trace();
    for nth in failing {
        simulator.inject(Fault::nth_call(*nth, code));
    }
    let outcome: Result<()> = match operation {
        Operation::New => {
            BlockBacking::new(&fixture.engine, Shapes::Rows.spec(), BLOCKS, PAGE).map(drop)
        }
        // Blocks that share pages with others, some of them backed already.
        Operation::Back => fixture.backing.back([0, 1, 2, 12, 13, 20]),
        Operation::Unback => fixture.backing.unback([2, 3, 4, 5, 9]),
        Operation::Evict | Operation::Move => fixture.backing.commit(&plan, &fixture.stream),
    };
    let calls = simulator.take_trace().len() as u64;
    simulator.clear_faults();
    match &outcome {
        Ok(()) => match operation {
            Operation::New => {}
            Operation::Back => [0, 1, 12, 13, 20]
                .map(|block| fixture.fill(block))
                .into_iter()
                .collect(),
            Operation::Unback => {
                (fixture.contents).retain(|(_, block), _| ![2, 3, 4, 5, 9].contains(block))
            }
            Operation::Evict | Operation::Move => fixture.committed(&plan),
        },
        Err(error) => {
            assert_eq!(error.driver_code(), Some(code), "{what}: {error}");
            assert!(
                !matches!(operation, Operation::Unback | Operation::Evict),
                "{what}: {error}"
            );
            // Blocks of no value may hold anything.
            for (_, to) in plan.moves() {
                fixture.fill(*to);
            }
        }
    }
    fixture.check();
    for _ in 0..3 {
        fixture.engine.step();
    }
    fixture.simulated.device.retry_quarantine();
    fixture.settle();
    fixture.check();
    let stats = fixture.backing.stats();
    assert_eq!(stats.committed_bytes, stats.page_bytes, "{what}: {stats}");
    assert_eq!(stats.pinned_blocks, 0, "{what}");
    // The plan is still true if it failed, and nothing stands in the way.
    if outcome.is_err() && matches!(operation, Operation::Move) {
        let plan = self::plan(&fixture, operation);
        fixture.commit(&plan);
    }
    fixture.back(0..BLOCKS);
    fixture.check();
    fixture.end();
    calls
}

#[test]
fn every_call_fails_in_turn() {
    let _turn = turn();
    for operation in ALL {
        let calls = run(operation, &[], 0);
        assert!(calls > 0, "{operation:?} makes no calls");
        for code in [CUDA_ERROR_OPERATING_SYSTEM, CUDA_ERROR_OUT_OF_MEMORY] {
            // Some more than a run without faults makes, for the calls that undo.
            for nth in 1..=calls + 4 {
                run(operation, &[nth], code);
            }
        }
    }
}

#[test]
fn every_pair_of_calls_fails_so_that_a_call_fails_with_its_undo() {
    let _turn = turn();
    for operation in ALL {
        let calls = run(operation, &[], 0);
        for first in 1..=calls {
            for second in first + 1..=first + 8 {
                run(operation, &[first, second], CUDA_ERROR_OPERATING_SYSTEM);
            }
        }
    }
}
