//! Sleep and wake with each driver call failing in turn, and with its undo.

use crate::common::{manual, turn};
use crate::fixture::{Fixture, PAGE, UNIT};
use cuda_vmm::sim::Fault;
use cuda_vmm::sys::{
    CUDA_ERROR_OPERATING_SYSTEM, CUDA_ERROR_OUT_OF_MEMORY, CUresult, DriverFunction,
};
use cuda_vmm::{Keep, PoolStats, VmmError, WakeOptions};

/// Does something with the calls of these numbers failing; returns how many calls it made, and
/// whether it worked.
fn with_faults(
    fixture: &mut Fixture,
    (failing, code): (&[u64], CUresult),
    act: impl FnOnce(&mut Fixture) -> cuda_vmm::Result<()>,
) -> (u64, bool) {
    let what = format!("calls {failing:?} failing with {code}");
    let simulator = fixture.simulated.simulator.clone();
    simulator.start_trace();
    for nth in failing {
        simulator.inject(Fault::nth_call(*nth, code));
    }
    let outcome = act(fixture);
    let calls = simulator.take_trace().len() as u64;
    simulator.clear_faults();
    if let Err(error) = &outcome {
        assert_eq!(error.driver_code(), Some(code), "{what}: {error}");
    }
    (calls, outcome.is_ok())
}

/// Lets the driver take back what it had refused.
fn recover(fixture: &Fixture) {
    fixture.simulated.device.synchronize().expect("done");
    for _ in 0..4 {
        fixture.engine.step();
    }
    fixture.simulated.device.retry_quarantine();
    assert_eq!(fixture.engine.stats().parts.quarantined_bytes, 0);
    assert_eq!(fixture.simulated.device.quarantined_bytes(), 0);
    fixture.check();
}

/// A pool of several chunks and extents, of which one page is parked.
fn pool() -> Fixture {
    let mut fixture = Fixture::new(manual().chunk_bytes_max(4 * PAGE), &[1]);
    fixture.take(0, 0..9);
    fixture.take(0, 20..22);
    fixture.take(0, 40..41);
    fixture.free(0, 40..41);
    fixture.settle();
    fixture
}

/// Without the parked page, which may go though the sleep fails.
fn without_parked(mut stats: PoolStats) -> PoolStats {
    stats.committed_bytes -= stats.parts.parked_bytes;
    stats.chunks -= stats.parts.parked_bytes / PAGE;
    stats.parts.parked_bytes = 0;
    stats
}

fn sleep(keeps: bool, failing: &[u64], code: CUresult) -> u64 {
    let what = format!("calls {failing:?} failing with {code}");
    let mut fixture = pool();
    let before = without_parked(fixture.pools[0].stats());
    let (calls, is_done) = with_faults(&mut fixture, (failing, code), |fixture| {
        let keep = match keeps {
            true => Keep::Host(&fixture.store),
            false => Keep::Nothing,
        };
        fixture.pools[0].sleep(keep).map(drop)
    });
    assert_eq!(fixture.pools[0].is_asleep(), is_done, "{what}");
    if failing.len() < 2 {
        fixture.check();
        let quarantined_bytes = fixture.engine.stats().parts.quarantined_bytes;
        match is_done {
            // What the driver did not release is tried again.
            true => assert_eq!(fixture.engine.stats().committed_bytes, quarantined_bytes),
            false if quarantined_bytes == 0 => {
                let after = without_parked(fixture.pools[0].stats());
                assert_eq!(after, before, "{what}");
                assert_eq!(fixture.store.stats().in_use_bytes, 0, "{what}");
            }
            // The parked page, which the driver refused to unmap or to release.
            false => assert_eq!(quarantined_bytes, PAGE, "{what}"),
        }
    }
    fixture.check_books();
    recover(&fixture);
    if !is_done {
        assert_eq!(without_parked(fixture.pools[0].stats()), before, "{what}");
        fixture.sleep(0).expect("the driver works again");
    }
    assert_eq!(fixture.engine.stats().committed_bytes, 0, "{what}");
    fixture.pools[0].wake().expect("room");
    if !keeps {
        let pages: Vec<_> = fixture.contents[0].keys().copied().collect();
        pages
            .iter()
            .for_each(|page| fixture.write(0, *page..page + 1));
    }
    fixture.check();
    fixture.end();
    calls
}

/// How the contents come back.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Comes {
    Not,
    Whole,
    Streaming,
}

fn wake(comes: Comes, failing: &[u64], code: CUresult) -> u64 {
    let keeps = comes != Comes::Not;
    let what = format!("calls {failing:?} failing with {code}");
    let mut fixture = pool();
    let keep = match keeps {
        true => Keep::Host(&fixture.store),
        false => Keep::Nothing,
    };
    fixture.pools[0].sleep(keep).expect("no call fails");
    let before = fixture.pools[0].stats();
    let (calls, is_done) = with_faults(&mut fixture, (failing, code), |fixture| match comes {
        Comes::Not | Comes::Whole => fixture.pools[0].wake(),
        Comes::Streaming => {
            let options = WakeOptions::new().bytes_per_second(1 << 40);
            fixture.pools[0].wake_streaming(&options).map(drop)
        }
    });
    assert_eq!(fixture.pools[0].is_asleep(), !is_done, "{what}");
    if !is_done && failing.len() < 2 {
        assert_eq!(fixture.pools[0].stats(), before, "{what}");
        assert_eq!(fixture.engine.stats().committed_bytes, 0, "{what}");
    }
    fixture.check_books();
    fixture.simulated.device.synchronize().expect("done");
    for _ in 0..4 {
        fixture.engine.step();
    }
    fixture.simulated.device.retry_quarantine();
    if !is_done {
        assert_eq!(fixture.pools[0].stats(), before, "{what}");
        assert_eq!(fixture.engine.stats().committed_bytes, 0, "{what}");
        fixture.pools[0].wake().expect("the driver works again");
    }
    if !keeps {
        let pages: Vec<_> = fixture.contents[0].keys().copied().collect();
        pages
            .iter()
            .for_each(|page| fixture.write(0, *page..page + 1));
    }
    recover(&fixture);
    assert_eq!(fixture.store.stats().in_use_bytes, 0, "{what}");
    fixture.end();
    calls
}

fn every_call_fails(run: impl Fn(&[u64], CUresult) -> u64) {
    let _turn = turn();
    let calls = run(&[], 0);
    assert!(calls > 8, "it calls the driver: {calls}");
    for code in [CUDA_ERROR_OPERATING_SYSTEM, CUDA_ERROR_OUT_OF_MEMORY] {
        for nth in 1..=calls + 2 {
            run(&[nth], code);
        }
    }
    for first in 1..=calls {
        for second in first + 1..=first + 8 {
            run(&[first, second], CUDA_ERROR_OPERATING_SYSTEM);
        }
    }
}

#[test]
fn each_call_of_a_sleep_that_keeps_fails_in_turn_and_with_its_undo() {
    every_call_fails(|failing, code| sleep(true, failing, code));
}

#[test]
fn each_call_of_a_sleep_that_keeps_nothing_fails_in_turn_and_with_its_undo() {
    every_call_fails(|failing, code| sleep(false, failing, code));
}

#[test]
fn each_call_of_a_wake_from_the_host_fails_in_turn_and_with_its_undo() {
    every_call_fails(|failing, code| wake(Comes::Whole, failing, code));
}

#[test]
fn each_call_of_a_wake_without_contents_fails_in_turn_and_with_its_undo() {
    every_call_fails(|failing, code| wake(Comes::Not, failing, code));
}

#[test]
fn each_call_of_a_wake_that_streams_fails_in_turn_and_with_its_undo() {
    every_call_fails(|failing, code| wake(Comes::Streaming, failing, code));
}

/// Lets all waits for a stream fail, until the faults are cleared.
fn fail_waits(fixture: &Fixture) {
    let wait = DriverFunction::cuStreamSynchronize;
    let fault = Fault::always(wait, CUDA_ERROR_OPERATING_SYSTEM);
    fixture.simulated.simulator.inject(fault);
}

#[test]
fn copies_out_that_cannot_be_waited_for_keep_the_chunks_and_the_host_bytes() {
    let _turn = turn();
    let mut fixture = Fixture::new(manual(), &[1]);
    fixture.take(0, 0..4);
    fixture.stream.synchronize().expect("done");
    fail_waits(&fixture);
    fixture.sleep(0).expect_err("no wait works");
    // The copies may still run.
    assert!(!fixture.pools[0].is_asleep());
    let stats = fixture.pools[0].stats();
    assert_eq!(stats.parts.quarantined_bytes, 4 * PAGE, "{stats}");
    assert_eq!(fixture.store.stats().in_use_bytes, UNIT);
    let (offset, bytes) = (0, PAGE);
    assert_eq!(
        fixture.pools[0].deallocate(offset, bytes),
        Err(VmmError::Quarantined { offset, bytes })
    );
    fixture.simulated.simulator.clear_faults();
    recover(&fixture);
    fixture.sleep(0).expect("the driver works again");
    fixture.pools[0].wake().expect("room");
    fixture.check();
    fixture.end();
}

#[test]
fn copies_in_that_cannot_be_waited_for_keep_the_memory_until_they_are_past() {
    let _turn = turn();
    let mut fixture = Fixture::new(manual().park_bytes_max(1 << 30), &[1]);
    fixture.take(0, 0..4);
    fixture.sleep(0).expect("idle");
    fail_waits(&fixture);
    fixture.pools[0].wake().expect_err("no wait works");
    assert!(fixture.pools[0].is_asleep());
    let stats = fixture.pools[0].stats();
    assert_eq!(stats.parts.retiring_bytes, 4 * PAGE, "{stats}");
    fixture.simulated.simulator.clear_faults();
    // A pool that sleeps parks nothing, whatever the engine may keep.
    fixture.settle();
    assert_eq!(fixture.engine.stats().committed_bytes, 0);
    fixture.pools[0].wake().expect("the driver works again");
    fixture.check();
    fixture.end();
}
