//! `compact`: slack goes back, and bytes stay what and where they are.
//!
//! A declared capture is the whole process's, and holds every `compact` back, so these tests take
//! turns.

mod common;

#[path = "compact/broken_off.rs"]
mod broken_off;
#[path = "compact/fixture.rs"]
mod fixture;
#[path = "compact/midway.rs"]
mod midway;

use common::{Gate, manual, turn, with_context};
use cuda_vmm::sys::{CU_STREAM_CAPTURE_MODE_RELAXED, CUDA_SUCCESS};
use cuda_vmm::{
    CaptureGuard, CompactReport, EngineOptions, PoolOptions, Quota, Stream, VirtualMemoryPool,
};
use fixture::{CHUNK, Fixture, PAGE, PAGES};
use proptest::prelude::*;
use std::time::Duration;

/// The budget of most tests has room to spare.
fn roomy() -> EngineOptions {
    manual().limit_bytes(4 * PAGES * PAGE)
}

fn numbers(report: CompactReport) -> [usize; 5] {
    [
        report.moved_bytes / PAGE,
        report.returned_bytes / PAGE,
        report.skipped_bytes / PAGE,
        report.chunks_before,
        report.chunks_after,
    ]
}

#[test]
fn slack_goes_back_and_every_byte_stays_in_its_place() {
    let _turn = turn();
    for named in [false, true] {
        let mut fixture = Fixture::new(roomy(), named);
        fixture.keep(|page| page.is_multiple_of(2));
        let before = fixture.pool.stats();
        assert_eq!(before.parts.slack_bytes, PAGES / 2 * PAGE);
        let chunks = PAGES / CHUNK;
        let expected = [PAGES / 2, PAGES / 2, 0, chunks, PAGES / 2];
        assert_eq!(numbers(fixture.pool.compact_report()), expected);
        let report = fixture.pool.compact().expect("room");
        assert_eq!(numbers(report), expected);
        let stats = fixture.pool.stats();
        assert_eq!(
            (stats.parts.slack_bytes, stats.live_bytes),
            (0, before.live_bytes)
        );
        assert_eq!(stats.committed_bytes, PAGES / 2 * PAGE);
        fixture.check();
        // What was given back can be had again.
        fixture.take(1..2);
        fixture.check();
        assert_eq!(fixture.pool.compact_report().moved_bytes, 0);
    }
}

#[test]
fn a_run_of_live_pages_stays_in_as_few_chunks_as_it_can() {
    let _turn = turn();
    let mut fixture = Fixture::new(roomy(), true);
    // Three quarters of the first chunk, and all of the second.
    fixture.keep(|page| (CHUNK / 4..2 * CHUNK).contains(&page));
    let report = fixture.pool.compact().expect("room");
    assert_eq!(numbers(report), [CHUNK * 3 / 4, CHUNK / 4, 0, 2, 3]);
    fixture.check();
}

#[test]
fn nothing_is_called_where_there_is_no_slack() {
    let _turn = turn();
    let mut fixture = Fixture::new(roomy(), true);
    fixture.keep(|page| page < 2 * CHUNK);
    let simulator = fixture.simulated.simulator.clone();
    simulator.start_trace();
    let report = fixture.pool.compact().expect("nothing to do");
    assert_eq!(simulator.take_trace(), []);
    assert_eq!(numbers(report), [0, 0, 0, 2, 2]);
    assert_eq!(
        report.to_string(),
        "0 B moved, 0 B given back, 0 B skipped; 2 mappings before, 2 after"
    );
}

#[test]
fn a_full_budget_lets_nothing_move_and_room_for_one_chunk_lets_all() {
    let _turn = turn();
    let full = PAGES * PAGE;
    let half = CHUNK / 2;
    for (spare, expected) in [
        (0, [0, 0, PAGES / 2, PAGES / CHUNK, PAGES / CHUNK]),
        (half - 1, [0, 0, PAGES / 2, PAGES / CHUNK, PAGES / CHUNK]),
        (half, [PAGES / 2, PAGES / 2, 0, PAGES / CHUNK, PAGES / 2]),
    ] {
        let options = manual().limit_bytes(full + spare * PAGE);
        let mut fixture = Fixture::new(options, true);
        fixture.keep(|page| page.is_multiple_of(2));
        assert_eq!(numbers(fixture.pool.compact_report()), expected);
        let report = fixture.pool.compact().expect("no room is no error");
        assert_eq!(numbers(report), expected, "{spare} pages to spare");
        fixture.check();
    }
}

#[test]
fn parked_memory_is_given_up_for_it() {
    let _turn = turn();
    let options = manual()
        .limit_bytes(PAGES * PAGE)
        .park_bytes_max(usize::MAX);
    let mut fixture = Fixture::new(options, true);
    fixture.keep(|page| page < PAGES - CHUNK && page.is_multiple_of(2));
    assert_eq!(fixture.engine.stats().parts.parked_bytes, CHUNK * PAGE);
    let moved = (PAGES - CHUNK) / 2;
    assert_eq!(fixture.pool.compact_report().moved_bytes, moved * PAGE);
    let report = fixture.pool.compact().expect("what was parked");
    assert_eq!(
        (report.moved_bytes, report.skipped_bytes),
        (moved * PAGE, 0)
    );
    assert_eq!(fixture.engine.stats().parts.parked_bytes, 0);
    fixture.check();
}

#[test]
fn memory_that_another_account_has_parked_is_given_up_for_it() {
    let _turn = turn();
    let options = manual()
        .limit_bytes((PAGES + CHUNK) * PAGE)
        .park_bytes_max(usize::MAX);
    let mut fixture = Fixture::new(options, true);
    let account = fixture.engine.account("other", Quota::new()).expect("new");
    let other = VirtualMemoryPool::on_account(&account, PAGES * PAGE, PAGE, PoolOptions::new());
    let other = other.expect("addresses");
    other.allocate(0, CHUNK * PAGE).expect("room");
    other.deallocate(0, CHUNK * PAGE).expect("live");
    fixture.keep(|page| page.is_multiple_of(2));
    assert_eq!(other.stats().parts.parked_bytes, CHUNK * PAGE);
    let report = fixture.pool.compact().expect("what was parked");
    assert_eq!(report.moved_bytes, PAGES / 2 * PAGE);
    assert!(other.stats().parts.parked_bytes < CHUNK * PAGE);
    fixture.check();
}

#[test]
fn nothing_moves_while_a_capture_is_declared_or_a_named_stream_is_captured() {
    let _turn = turn();
    let mut fixture = Fixture::new(roomy(), true);
    fixture.keep(|page| page.is_multiple_of(2));
    let chunks = PAGES / CHUNK;
    let nothing = [0, 0, PAGES / 2, chunks, chunks];
    let guard = CaptureGuard::new();
    assert_eq!(numbers(fixture.pool.compact_report()), nothing);
    let simulated = &fixture.simulated;
    let report = simulated.unchanged(|| fixture.pool.compact().expect("nothing to do"));
    assert_eq!(numbers(report), nothing);
    drop(guard);

    let table = *fixture.simulated.driver.table();
    let (device, raw) = (fixture.simulated.device.clone(), fixture.stream.raw());
    with_context(&device, || {
        // SAFETY: the stream is alive.
        let code = unsafe { (table.cuStreamBeginCapture)(raw, CU_STREAM_CAPTURE_MODE_RELAXED) };
        assert_eq!(code, CUDA_SUCCESS, "cuStreamBeginCapture");
    });
    let report = fixture.pool.compact().expect("nothing to do");
    assert_eq!(numbers(report), nothing);
    with_context(&device, || {
        let mut graph = core::ptr::null_mut();
        // SAFETY: the stream is alive and `graph` a valid place for the answer.
        let code = unsafe { (table.cuStreamEndCapture)(raw, &mut graph) };
        assert_eq!(code, CUDA_SUCCESS, "the capture was killed");
        // SAFETY: the graph was just made and is destroyed once.
        assert_eq!(unsafe { (table.cuGraphDestroy)(graph) }, CUDA_SUCCESS);
    });
    let report = fixture.pool.compact().expect("room");
    assert_eq!(report.skipped_bytes, 0);
    fixture.check();
}

#[test]
fn it_waits_for_work_that_was_queued_before() {
    let _turn = turn();
    for named in [false, true] {
        let mut fixture = Fixture::new(roomy(), named);
        fixture.keep(|page| page.is_multiple_of(2));
        let device = fixture.simulated.device.clone();
        let gate = Gate::close(&device, fixture.stream.raw());
        // Page 2 changes behind the gate.
        let address = fixture.pool.base_address() + 2 * PAGE as u64;
        // SAFETY: the page is live, and `compact` waits for this before it moves it.
        unsafe { fixture.stream.memset(address, 7, PAGE) }.expect("queued");
        fixture.contents.insert(2, vec![7; PAGE]);
        gate.wait_until_reached();
        let pool = &mut fixture.pool;
        std::thread::scope(|scope| {
            // In here, so that a failure opens it before the scope waits for its threads.
            let gate = gate;
            let compacting = scope.spawn(move || pool.compact());
            // Time for it to go wrong in.
            std::thread::sleep(Duration::from_millis(30));
            assert!(!compacting.is_finished(), "the work has not run");
            gate.open();
            let report = compacting.join().expect("no panic").expect("room");
            assert_eq!(report.skipped_bytes, 0);
        });
        fixture.check();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn slack_afterwards_is_an_eighth_of_what_is_live_and_a_page_at_most(
        kept in prop::collection::vec(any::<bool>(), PAGES),
        again in prop::collection::vec(prop::bool::weighted(0.2), PAGES),
        named in any::<bool>(),
    ) {
        let _turn = turn();
        let mut fixture = Fixture::new(roomy(), named);
        fixture.keep(|page| kept[page]);
        for page in (0..PAGES).filter(|page| again[*page] && !kept[*page]) {
            fixture.take(page..page + 1);
        }
        let planned = fixture.pool.compact_report();
        let report = fixture.pool.compact().expect("room");
        prop_assert_eq!(report, planned);
        let stats = fixture.pool.stats();
        prop_assert!(stats.parts.slack_bytes <= stats.parts.live_page_bytes / 8 + PAGE, "{}", stats);
        prop_assert_eq!(report.skipped_bytes, stats.parts.slack_bytes);
        prop_assert_eq!(fixture.pool.compact().expect("room").moved_bytes, 0);
        fixture.check();
    }
}

#[test]
fn chunks_that_were_leased_are_moved_only_after_work_of_the_lease() {
    let _turn = turn();
    let mut fixture = Fixture::new(manual(), true);
    let token = std::sync::Arc::new(());
    let leased = fixture.pool.lease(0, PAGE, token.clone());
    leased.expect("live");
    fixture.keep(|page| page % CHUNK == 0);
    // The holder of the lease works on a stream that is not named.
    let other = Stream::new(&fixture.simulated.device).expect("a stream");
    let gate = Gate::close(&fixture.simulated.device, other.raw());
    // SAFETY: the page is live; that it stays mapped until the work has run is what is tested.
    unsafe { other.memset(fixture.address(0), 3, PAGE) }.expect("queued");
    fixture.contents.insert(0, vec![3; PAGE]);
    drop(token);
    assert!(!fixture.pool.is_leased(0, PAGE));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(20));
            gate.open();
        });
        let report = fixture.pool.compact().expect("no call fails");
        assert_eq!(report.moved_bytes, PAGES / CHUNK * PAGE);
    });
    other.synchronize().expect("legal work");
    fixture.check();
}
