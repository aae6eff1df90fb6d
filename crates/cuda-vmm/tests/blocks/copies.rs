//! The copies of a commit, on the stream that it is given: what waits for them, and that nothing
//! else does.

use crate::common::{Gate, manual, turn};
use crate::fixture::{Fixture, PAGE, Shapes};
use cuda_vmm::Stream;
use cuda_vmm::pool::blocks::ReclaimPlan;
use cuda_vmm::sim::Fault;
use cuda_vmm::sys::{CUDA_ERROR_OPERATING_SYSTEM, DriverFunction};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A backing for which its stream is named, and a plan that moves blocks.
fn with_moves() -> (Fixture, ReclaimPlan) {
    let mut fixture = Fixture::new(Shapes::Mla, 24, manual());
    let named = fixture.backing.use_stream(&fixture.stream);
    named.expect("of this device");
    fixture.back(2..12);
    let plan = moves(&fixture);
    (fixture, plan)
}

/// Blocks of no value, into which the others move.
fn moves(fixture: &Fixture) -> ReclaimPlan {
    let cost = |block: usize| block.is_multiple_of(2).then_some(0.0);
    let plan = (fixture.backing).reclaim_candidates_with_moves(3 * PAGE, 1.0, cost);
    assert!(!plan.moves().is_empty());
    plan
}

#[test]
fn a_stream_that_a_commit_is_given_is_not_named() {
    let _turn = turn();
    let (mut fixture, _) = with_moves();
    let before = fixture.simulated.books().streams;
    for _ in 0..20 {
        let plan = moves(&fixture);
        let stream = Stream::new(&fixture.simulated.device).expect("a stream");
        fixture.backing.commit(&plan, &stream).expect("true");
        stream.synchronize().expect("copied");
        fixture.committed(&plan);
        fixture.check();
        drop(stream);
        assert_eq!(fixture.simulated.books().streams, before);
        let backed: Vec<_> = (0..24)
            .filter(|at| fixture.backing.is_backed(*at))
            .collect();
        fixture.unback(backed);
        fixture.settle();
        fixture.back(2..12);
    }
    fixture.end();
}

#[test]
fn memory_that_is_given_up_waits_for_copies_on_a_stream_that_is_not_named() {
    let _turn = turn();
    let (mut fixture, plan) = with_moves();
    let stream = Stream::new(&fixture.simulated.device).expect("a stream");
    let gate = Gate::close(&fixture.simulated.device, stream.raw());
    fixture.backing.commit(&plan, &stream).expect("true");
    fixture.committed(&plan);
    drop(stream);
    for _ in 0..3 {
        let report = fixture.engine.step();
        assert_eq!(report.drained_bytes, 0, "the copies read it");
        assert!(report.retiring_bytes > 0);
    }
    gate.open();
    fixture.settle();
    assert!(!fixture.simulated.simulator.is_poisoned(0));
    fixture.check();
    fixture.end();
}

#[test]
fn copies_that_were_queued_before_one_failed_are_waited_for() {
    let _turn = turn();
    let (mut fixture, plan) = with_moves();
    let simulator = &fixture.simulated.simulator;
    let stream = Stream::new(&fixture.simulated.device).expect("a stream");
    let gate = Gate::close(&fixture.simulated.device, stream.raw());
    let call = DriverFunction::cuMemcpyDtoDAsync;
    simulator.inject(Fault::nth_of(call, 2, CUDA_ERROR_OPERATING_SYSTEM));
    let is_opened = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(30));
            is_opened.store(true, Ordering::SeqCst);
            gate.open();
        });
        let outcome = fixture.backing.commit(&plan, &stream);
        assert!(outcome.is_err(), "the second copy was refused");
        // The target of the first is free again, for others to write.
        assert!(is_opened.load(Ordering::SeqCst), "the first was not over");
    });
    for (_, to) in plan.moves() {
        fixture.fill(*to);
    }
    fixture.check();
    drop(stream);
    fixture.end();
}

#[test]
fn copies_come_after_what_is_still_done_with_memory_that_was_taken_back() {
    let _turn = turn();
    let (mut fixture, _) = with_moves();
    let gate = Gate::close(&fixture.simulated.device, fixture.stream.raw());
    fixture.backing.unback(2..12).expect("backed");
    // At once, as the stream that is named does what is left to do before it does more.
    fixture.backing.back(2..12).expect("taken back");
    let plan = moves(&fixture);
    let stream = Stream::new(&fixture.simulated.device).expect("a stream");
    fixture.backing.commit(&plan, &stream).expect("true");
    let copied = stream.record().expect("recorded");
    // Time for it to go wrong in.
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(copied.is_complete(), Ok(false), "behind the gate");
    gate.open();
    stream.synchronize().expect("copied");
    drop((stream, copied));
    fixture.contents.clear();
    fixture.settle();
    fixture.end();
}
