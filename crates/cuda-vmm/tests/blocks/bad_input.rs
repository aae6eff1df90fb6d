//! What cannot be granted: the exact error, and nothing changed.

use crate::common::{Simulated, manual, turn, with_context};
use crate::fixture::{Fixture, PAGE, Shapes};
use cuda_vmm::pool::blocks::{
    BlockBacking, BlockError, ElementSize, LayerSpec, ReclaimPlan, TensorSpec,
};
use cuda_vmm::sim::SimConfig;
use cuda_vmm::sys::{CU_STREAM_CAPTURE_MODE_RELAXED, CUDA_SUCCESS};
use cuda_vmm::{CaptureGuard, Driver, Engine, Stream, VmmError};

#[track_caller]
fn refused<T: core::fmt::Debug>(outcome: Result<T, VmmError>, error: BlockError) {
    assert_eq!(outcome.expect_err("it is refused"), VmmError::Block(error));
}

#[test]
fn a_backing_of_nothing_or_of_too_much_is_refused() {
    let _turn = turn();
    let simulated = Simulated::new(SimConfig::new().granularity_bytes(PAGE));
    let engine = Engine::new(&simulated.device, manual()).expect("an engine");
    let new = |blocks, page| BlockBacking::new(&engine, Shapes::Mla.spec(), blocks, page);
    simulated.unchanged(|| {
        let what = "number of blocks";
        assert_eq!(new(0, PAGE).expect_err("none"), VmmError::ZeroSize { what });
        for page_bytes in [0, PAGE / 2, 3 * PAGE] {
            let error = new(1, page_bytes).expect_err("no page");
            let granularity_bytes = PAGE;
            assert_eq!(
                error,
                VmmError::InvalidPageSize {
                    page_bytes,
                    granularity_bytes
                }
            );
        }
        let (what, count, each_bytes) = ("tensor", usize::MAX / 3000, 3072);
        refused(
            new(count, PAGE),
            BlockError::Overflow {
                what,
                count,
                each_bytes,
            },
        );
        let byte = ElementSize::new(1).expect("not zero");
        let spec = TensorSpec::new("t", &[1], byte).expect("small");
        let spec = LayerSpec::new([spec]).expect("one tensor");
        let (blocks, each_bytes) = (usize::MAX, 16);
        let error = BlockBacking::new(&engine, spec, blocks, PAGE).expect_err("no room");
        assert_eq!(error, BlockError::TooMany { blocks, each_bytes }.into());
    });
}

#[test]
fn blocks_that_are_not_there_or_not_backed_are_refused() {
    let _turn = turn();
    let mut fixture = Fixture::new(Shapes::Mla, 8, manual());
    fixture.back([1, 2]);
    let (block, blocks) = (8, 8);
    let invalid = || BlockError::Invalid { block, blocks };
    refused(fixture.backing.back([3, 9, 8]), invalid());
    refused(fixture.backing.back([usize::MAX, 8]), invalid());
    refused(fixture.backing.try_back([8]), invalid());
    refused(fixture.backing.unback([1, 8]), invalid());
    refused(fixture.backing.pin(1..9), invalid());
    refused(fixture.backing.pages_of(8), invalid());
    assert!(!fixture.backing.is_backed(8));
    let block = 3;
    refused(
        fixture.backing.unback([1, 3]),
        BlockError::NotBacked { block },
    );
    refused(fixture.backing.pin([1, 3]), BlockError::NotBacked { block });
    assert_eq!(fixture.backing.stats().pinned_blocks, 0, "all or none");
    let pin = fixture.backing.pin([2]).expect("backed");
    let block = 2;
    refused(fixture.backing.unback([1, 2]), BlockError::Pinned { block });
    fixture.check();
    drop(pin);
    // Nothing to do is no mistake.
    fixture.simulated.unchanged(|| {
        assert_eq!(fixture.backing.back([]), Ok(()));
        assert_eq!(fixture.backing.unback([]), Ok(()));
        assert!(fixture.backing.pin([]).is_ok());
        assert_eq!(fixture.backing.back([1, 1, 2]), Ok(()), "backed already");
    });
    fixture.check();
    fixture.end();
}

fn commit(fixture: &Fixture, plan: &ReclaimPlan) -> Result<(), VmmError> {
    fixture.backing.commit(plan, &fixture.stream)
}

#[test]
fn a_plan_that_is_no_longer_true_changes_nothing() {
    let _turn = turn();
    let mut fixture = Fixture::new(Shapes::Vectors, 64, manual());
    fixture.back((0..64).filter(|block| *block != 5));
    // Page 0 is evicted, which empties only if block 5 stays away, and of page 1 one block is moved
    // into page 2.
    let plan = |fixture: &Fixture| {
        let cost = |block| (block < 31 || block == 40).then_some(0.0);
        let bytes = 4 * PAGE;
        fixture
            .backing
            .reclaim_candidates_with_moves(bytes, 1.0, cost)
    };
    let first = plan(&fixture);
    assert_eq!(first.freed_bytes(), 4 * PAGE);
    assert!(!first.evicted().is_empty() && !first.moves().is_empty());
    let (from, to) = first.moves()[0];
    let evicted = first.evicted()[0];
    // Put to use again, though it was backed.
    for block in [evicted, from, to] {
        let plan = plan(&fixture);
        fixture.backing.back([block]).expect("backed already");
        refused(commit(&fixture, &plan), BlockError::StalePlan { block });
        fixture.check();
    }
    // Pinned, and pinned once.
    for block in [evicted, from, to] {
        let plan = plan(&fixture);
        let pin = fixture.backing.pin([block]).expect("backed");
        refused(commit(&fixture, &plan), BlockError::Pinned { block });
        drop(pin);
        refused(commit(&fixture, &plan), BlockError::StalePlan { block });
        fixture.check();
    }
    // Given up, and backed again.
    let stale = plan(&fixture);
    fixture.unback([evicted]);
    let block = evicted;
    refused(commit(&fixture, &stale), BlockError::StalePlan { block });
    fixture.back([evicted]);
    refused(commit(&fixture, &stale), BlockError::StalePlan { block });
    // A neighbour came to a page that was to empty.
    let stale = plan(&fixture);
    fixture.back([5]);
    let block = 5;
    refused(commit(&fixture, &stale), BlockError::StalePlan { block });
    fixture.unback([5]);
    fixture.check();
    // Others do no harm, and a plan is carried out once.
    let fresh = plan(&fixture);
    fixture.commit(&fresh);
    fixture.check();
    let again = commit(&fixture, &fresh).expect_err("it was carried out");
    assert!(
        matches!(again, VmmError::Block(BlockError::StalePlan { .. })),
        "{again}"
    );
    assert!(again.is_permanent());
    fixture.check();
    fixture.end();
}

#[test]
fn plans_and_streams_of_others_are_refused() {
    let _turn = turn();
    let mut fixture = Fixture::new(Shapes::Vectors, 16, manual());
    let other = Fixture::new(Shapes::Vectors, 16, manual());
    fixture.back(0..16);
    let plan = fixture.backing.reclaim_candidates(1, |_| Some(0.0));
    assert!(plan.is_enough());
    refused(
        other.backing.commit(&plan, &other.stream),
        BlockError::ForeignPlan,
    );
    assert_eq!(
        fixture.backing.commit(&plan, &other.stream),
        Err(VmmError::WrongDriver)
    );
    assert_eq!(
        fixture.backing.use_stream(&other.stream),
        Err(VmmError::WrongDriver)
    );
    fixture.check();
    fixture.end();
    other.end();

    let config = SimConfig::new().devices(2).granularity_bytes(PAGE);
    let driver = Driver::simulated(config).expect("a simulator");
    let (first, second) = (
        driver.device(0).expect("first"),
        driver.device(1).expect("second"),
    );
    let engine = Engine::new(&first, manual()).expect("an engine");
    let backing = BlockBacking::new(&engine, Shapes::Mla.spec(), 4, PAGE).expect("a backing");
    let stream = Stream::new(&second).expect("a stream");
    let plan = backing.reclaim_candidates(1, |_| Some(0.0));
    let (expected, found) = (0, 1);
    let error = Err(VmmError::WrongDevice { expected, found });
    assert_eq!(backing.commit(&plan, &stream), error);
    assert_eq!(backing.use_stream(&stream), error);
}

#[test]
fn nothing_moves_on_a_stream_that_is_captured() {
    let _turn = turn();
    let mut fixture = Fixture::new(Shapes::Vectors, 32, manual());
    fixture.back(0..32);
    let cost = |block| (![0, 20].contains(&block)).then_some(0.0);
    let plan = fixture.backing.reclaim_candidates_with_moves(1, 1.0, cost);
    let device = fixture.simulated.device.clone();
    let table = *device.driver().table();
    let guard = CaptureGuard::new();
    // SAFETY: the stream is alive.
    let code = with_context(&device, || unsafe {
        (table.cuStreamBeginCapture)(fixture.stream.raw(), CU_STREAM_CAPTURE_MODE_RELAXED)
    });
    assert_eq!(code, CUDA_SUCCESS);
    let moves = 1;
    let outcome = fixture.backing.commit(&plan, &fixture.stream);
    refused(outcome, BlockError::Capturing { moves });
    let mut graph = core::ptr::null_mut();
    // SAFETY: the stream is alive, and `graph` a valid place.
    let code = with_context(&device, || unsafe {
        (table.cuStreamEndCapture)(fixture.stream.raw(), &mut graph)
    });
    assert_eq!(code, CUDA_SUCCESS, "the capture is intact");
    // SAFETY: the graph is this test's own.
    let code = with_context(&device, || unsafe { (table.cuGraphDestroy)(graph) });
    assert_eq!(code, CUDA_SUCCESS);
    drop((guard, device));
    fixture.check();
    fixture.commit(&plan);
    fixture.check();
    fixture.end();
}

#[test]
fn what_the_budget_cannot_hold_is_refused_before_any_driver_call() {
    let _turn = turn();
    let mut fixture = Fixture::new(Shapes::Vectors, 64, manual().limit_bytes(5 * PAGE));
    fixture.back(0..16);
    let simulator = fixture.simulated.simulator.clone();
    simulator.start_trace();
    let error = fixture.backing.back(0..48).expect_err("four pages more");
    assert_eq!(simulator.take_trace(), []);
    assert_eq!(
        error,
        VmmError::OutOfPhysicalMemory {
            asked_bytes: 4 * PAGE,
            free_bytes: 3 * PAGE,
            retiring_bytes: 0,
            reclaimable_bytes: 0,
            limit_bytes: 5 * PAGE,
        }
    );
    fixture.check();
    fixture.back(0..32);
    fixture.check();
    fixture.end();
}
