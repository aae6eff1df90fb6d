//! A `compact` that is broken off at any driver call loses nothing.

use crate::common::{manual, turn};
use crate::fixture::{CHUNK, Fixture, PAGE, PAGES};
use crate::roomy;
use cuda_vmm::VmmError;
use cuda_vmm::sim::Fault;
use cuda_vmm::sys::{
    CUDA_ERROR_OPERATING_SYSTEM, CUDA_ERROR_OUT_OF_MEMORY, CUresult, DriverFunction,
};

/// Two chunks, one of them with two runs of live pages and one with one.
fn kept(page: usize) -> bool {
    [1, 2, 5, 12, 13, 14].contains(&page)
}

/// Compacts with the calls of these numbers failing; says how many calls it made.
fn run(failing: &[u64], code: CUresult) -> u64 {
    let what = format!("calls {failing:?} failing with {code}");
    let mut fixture = Fixture::new(roomy(), true);
    fixture.keep(kept);
    let simulator = fixture.simulated.simulator.clone();
    let before = fixture.pool.stats();
    simulator.start_trace();
    for nth in failing {
        simulator.inject(Fault::nth_call(*nth, code));
    }
    let outcome = fixture.pool.compact();
    let calls = simulator.take_trace().len() as u64;
    simulator.clear_faults();
    if let Err(error) = &outcome {
        assert_eq!(error.driver_code(), Some(code), "{what}: {error}");
    }
    fixture.check_books();
    let stats = fixture.pool.stats();
    assert_eq!(stats.live_bytes, before.live_bytes, "{what}");
    if failing.len() < 2 {
        // One fault strands nothing: every byte can be read at once.
        fixture.check();
    }
    for _ in 0..3 {
        fixture.engine.step();
    }
    fixture.simulated.device.retry_quarantine();
    assert_eq!(fixture.engine.stats().parts.quarantined_bytes, 0, "{what}");
    fixture.check();
    let report = fixture.pool.compact().expect("the driver works again");
    assert_eq!(report.skipped_bytes, 0, "{what}");
    assert_eq!(fixture.pool.stats().committed_bytes, 6 * PAGE, "{what}");
    fixture.check();
    fixture.end();
    calls
}

#[test]
fn every_call_fails_in_turn() {
    let _turn = turn();
    let calls = run(&[], 0);
    for code in [CUDA_ERROR_OPERATING_SYSTEM, CUDA_ERROR_OUT_OF_MEMORY] {
        for nth in 1..=calls + 2 {
            run(&[nth], code);
        }
    }
}

#[test]
fn every_pair_of_calls_fails_so_that_a_call_fails_with_its_undo() {
    let _turn = turn();
    let calls = run(&[], 0);
    for first in 1..=calls {
        for second in first + 1..=first + 8 {
            run(&[first, second], CUDA_ERROR_OPERATING_SYSTEM);
        }
    }
}

/// A pool whose first chunk is neither moved nor in its place: making it accessible failed, for the
/// new memory, for the old, and `more` times after that.
fn stranded(more: u64) -> Fixture {
    stranded_with(more, None)
}

/// The same, where the `refused`th unmapping fails as well.
fn stranded_with(more: u64, refused: Option<u64>) -> Fixture {
    let mut fixture = Fixture::new(manual().limit_bytes(2 * PAGES * PAGE), true);
    fixture.keep(|page| page < CHUNK && page.is_multiple_of(2));
    let pieces = CHUNK as u64 / 2;
    for nth in pieces + 1..=pieces + 2 + more {
        let fault = Fault::nth_of(
            DriverFunction::cuMemSetAccess,
            nth,
            CUDA_ERROR_OPERATING_SYSTEM,
        );
        fixture.simulated.simulator.inject(fault);
    }
    if let Some(nth) = refused {
        let fault = Fault::nth_of(DriverFunction::cuMemUnmap, nth, CUDA_ERROR_OPERATING_SYSTEM);
        fixture.simulated.simulator.inject(fault);
    }
    fixture.pool.compact().expect_err("two calls fail");
    fixture
}

#[test]
fn stranded_bytes_are_kept_and_answer_that_they_are_in_quarantine() {
    let _turn = turn();
    let fixture = stranded(2);
    let (stats, live) = (fixture.pool.stats(), CHUNK / 2 * PAGE);
    assert_eq!((stats.live_bytes, stats.parts.live_page_bytes), (live, 0));
    assert_eq!(stats.parts.quarantined_bytes, CHUNK * PAGE);
    assert_eq!(stats.committed_bytes, CHUNK * PAGE);
    fixture.check_books();
    let (offset, bytes) = (0, PAGE);
    assert_eq!(
        fixture.pool.deallocate(offset, bytes),
        Err(VmmError::Quarantined { offset, bytes })
    );
    // An allocation tries to put it right first, in vain for now.
    let offset = PAGE;
    assert_eq!(
        fixture.pool.allocate(offset, bytes),
        Err(VmmError::Quarantined { offset, bytes })
    );
    assert!(fixture.pool.is_mapped(0, PAGE), "it is live all the same");
    assert_eq!(fixture.engine.step().quarantined_bytes, CHUNK * PAGE);
    // The driver works again.
    assert_eq!(fixture.engine.step().quarantined_bytes, 0);
    fixture.check();
    assert_eq!(fixture.pool.stats().parts.slack_bytes, CHUNK / 2 * PAGE);
}

#[test]
fn each_way_of_trying_again_puts_stranded_bytes_right() {
    let _turn = turn();
    let mut fixture = stranded(0);
    let report = fixture.pool.compact().expect("the driver works again");
    assert_eq!(report.moved_bytes, CHUNK / 2 * PAGE);
    fixture.check();
    let fixture = stranded(0);
    fixture.pool.trim().expect("nothing is refused");
    fixture.check();
    let mut fixture = stranded(0);
    fixture.take(1..2);
    fixture.check();
}

#[test]
fn memory_that_is_in_its_place_but_not_accessible_is_made_so_by_a_retry() {
    let _turn = turn();
    // The pieces at scratch addresses, the old memory, the new memory, and then the old again.
    let fixture = stranded_with(0, Some(CHUNK as u64 / 2 + 3));
    assert_eq!(fixture.simulated.books().mappings, 1);
    assert_eq!(fixture.engine.stats().parts.quarantined_bytes, CHUNK * PAGE);
    fixture.check_books();
    fixture.simulated.simulator.start_trace();
    assert_eq!(fixture.engine.step().quarantined_bytes, 0);
    let trace = fixture.simulated.simulator.take_trace();
    assert_eq!(trace, [DriverFunction::cuMemSetAccess]);
    fixture.check();
    fixture.end();
}

#[test]
fn a_pool_that_ends_with_stranded_bytes_gives_all_back() {
    let _turn = turn();
    stranded(0).end();
    stranded(1).end();
    // The engine goes on without the pool, and puts right what is left of it.
    let fixture = stranded(1);
    let engine = fixture.engine.clone();
    fixture.pool.close().expect("nothing but what is stranded");
    assert_eq!(engine.stats().parts.quarantined_bytes, CHUNK * PAGE);
    for _ in 0..4 {
        engine.step();
    }
    let stats = engine.stats();
    assert_eq!((stats.committed_bytes, stats.ranges), (0, 0), "{stats}");
}

#[test]
fn a_copy_that_cannot_be_waited_for_keeps_both_ends_mapped() {
    let _turn = turn();
    let mut fixture = Fixture::new(roomy(), true);
    fixture.keep(|page| page < CHUNK && page.is_multiple_of(2));
    let simulator = fixture.simulated.simulator.clone();
    let fault = Fault::always(
        DriverFunction::cuStreamSynchronize,
        CUDA_ERROR_OPERATING_SYSTEM,
    );
    simulator.inject(fault);
    let before = fixture.simulated.books();
    fixture.pool.compact().expect_err("its end is not known");
    let books = fixture.simulated.books();
    let copied = CHUNK / 2;
    assert_eq!(books.mappings, before.mappings + copied);
    assert_eq!(
        fixture.engine.stats().parts.quarantined_bytes,
        (CHUNK + copied) * PAGE
    );
    fixture.check_books();
    simulator.clear_faults();
    fixture.engine.step();
    assert_eq!(fixture.engine.stats().parts.quarantined_bytes, 0);
    fixture.check();
}
