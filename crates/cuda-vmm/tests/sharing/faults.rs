//! Sharing, its end and private memory, with each driver call failing in turn.

use crate::common::{manual, turn};
use crate::fixture::{CHUNK, Fixture, PAGE};
use cuda_vmm::sim::Fault;
use cuda_vmm::sys::{CUDA_ERROR_OPERATING_SYSTEM, CUDA_ERROR_OUT_OF_MEMORY, CUresult};

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
    fixture.check_books();
    (calls, outcome.is_ok())
}

/// Lets the driver take back what it had refused.
fn recover(fixture: &Fixture) {
    for _ in 0..4 {
        fixture.engine.step();
    }
    fixture.simulated.device.retry_quarantine();
    assert_eq!(fixture.engine.stats().parts.quarantined_bytes, 0);
    fixture.check();
}

fn share(failing: &[u64], code: CUresult) -> u64 {
    let mut fixture = Fixture::new(manual(), 3);
    fixture.take(0, 0..2 * CHUNK);
    fixture.share(0, 2, 0..CHUNK);
    let before = (fixture.simulated.books(), fixture.account.stats());
    let (calls, is_done) = with_faults(&mut fixture, (failing, code), |fixture| {
        fixture
            .try_share(0, 1, 0..2 * CHUNK)
            .map(cuda_vmm::Shared::keep)
    });
    if is_done {
        for page in 0..2 * CHUNK {
            let number = fixture.contents[0][&page];
            fixture.contents[1].insert(page, number);
        }
    } else if failing.len() < 2 {
        let after = (fixture.simulated.books(), fixture.account.stats());
        assert_eq!(after, before, "call {failing:?}");
    }
    recover(&fixture);
    if !is_done {
        assert_eq!(fixture.account.stats(), before.1);
        assert_eq!(fixture.share(0, 1, 0..2 * CHUNK), []);
    }
    fixture.check();
    fixture.end();
    calls
}

fn make_private(failing: &[u64], code: CUresult) -> u64 {
    let mut fixture = Fixture::new(manual(), 2);
    fixture.take(0, 0..2 * CHUNK);
    fixture.share(0, 1, 0..2 * CHUNK);
    fixture.free(1, 2 * CHUNK - 1..2 * CHUNK);
    fixture.settle();
    let (calls, is_done) = with_faults(&mut fixture, (failing, code), |fixture| {
        fixture.pools[1].make_private(0, 2 * CHUNK * PAGE).map(drop)
    });
    if failing.len() < 2 {
        // One fault strands nothing: every byte can be read at once.
        fixture.check();
    }
    recover(&fixture);
    if !is_done {
        let again = fixture.pools[1].make_private(0, 2 * CHUNK * PAGE);
        again.expect("the driver works again");
    }
    fixture.settle();
    assert_eq!(fixture.account.stats().parts.shared_bytes, 0);
    fixture.write(1, 0..2 * CHUNK - 1);
    fixture.check();
    fixture.end();
    calls
}

/// Three pools let two chunks go; the calls of these numbers fail meanwhile.
fn let_go(failing: &[u64], code: CUresult) -> u64 {
    let mut fixture = Fixture::new(manual(), 3);
    fixture.take(0, 0..2 * CHUNK);
    fixture.share(0, 1, 0..2 * CHUNK);
    fixture.share(0, 2, 0..CHUNK);
    fixture.free(1, 0..2 * CHUNK);
    let (calls, _) = with_faults(&mut fixture, (failing, code), |fixture| {
        fixture.engine.step();
        fixture.check_books();
        fixture.free(0, 0..2 * CHUNK);
        fixture.free(2, 0..CHUNK);
        fixture.check_books();
        fixture.engine.step();
        Ok(())
    });
    recover(&fixture);
    let parts = fixture.account.stats().parts;
    assert_eq!(parts.total_bytes(), parts.parked_bytes, "{parts}");
    fixture.engine.trim().expect("the driver works again");
    assert_eq!(fixture.engine.stats().committed_bytes, 0);
    fixture.end();
    calls
}

fn every_call_fails(run: fn(&[u64], CUresult) -> u64) {
    let _turn = turn();
    let calls = run(&[], 0);
    assert!(calls > 1, "it calls the driver");
    for code in [CUDA_ERROR_OPERATING_SYSTEM, CUDA_ERROR_OUT_OF_MEMORY] {
        for nth in 1..=calls + 2 {
            run(&[nth], code);
        }
    }
    for first in 1..=calls {
        for second in first + 1..=first + 6 {
            run(&[first, second], CUDA_ERROR_OPERATING_SYSTEM);
        }
    }
}

#[test]
fn each_call_of_sharing_fails_in_turn_and_with_its_undo() {
    every_call_fails(share);
}

#[test]
fn each_call_of_making_private_fails_in_turn_and_with_its_undo() {
    every_call_fails(make_private);
}

#[test]
fn each_call_of_letting_go_fails_in_turn_and_with_its_undo() {
    every_call_fails(let_go);
}
