//! Contents that do not change: the second sleep copies nothing.

use crate::common::manual;
use crate::fixture::{Fixture, PAGE, UNIT};
use cuda_vmm::{Keep, VmmError};

fn sleep(fixture: &mut Fixture) -> usize {
    let slept = fixture.pools[0].sleep(Keep::Constant(&fixture.store));
    slept.expect("idle").copied_bytes
}

#[test]
fn the_second_sleep_copies_nothing() {
    let mut fixture = Fixture::new(manual(), &[1]);
    fixture.take(0, 0..9);
    assert_eq!(sleep(&mut fixture), 9 * PAGE);
    for _ in 0..3 {
        fixture.pools[0].wake().expect("room");
        // The copy stays.
        assert_eq!(fixture.pools[0].stats().host_bytes, UNIT);
        fixture.check();
        assert_eq!(sleep(&mut fixture), 0);
        fixture.check();
    }
    // A wake after a sleep that does not promise anything gives it back.
    fixture.pools[0].wake().expect("room");
    assert_eq!(fixture.sleep(0).expect("idle").copied_bytes, 9 * PAGE);
    fixture.pools[0].wake().expect("room");
    assert_eq!(fixture.pools[0].stats().host_bytes, 0);
    fixture.check();
    fixture.end();
}

#[test]
fn what_is_allocated_or_freed_meanwhile_is_copied_anew() {
    let changes: [fn(&mut Fixture); 3] = [
        |fixture| fixture.take(0, 20..21),
        |fixture| fixture.free(0, 3..4),
        // The same bytes are live, and are others.
        |fixture| {
            fixture.free(0, 3..4);
            fixture.take(0, 3..4);
        },
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let mut fixture = Fixture::new(manual(), &[1]);
        fixture.take(0, 0..9);
        sleep(&mut fixture);
        fixture.pools[0].wake().expect("room");
        change(&mut fixture);
        fixture.settle();
        let live_bytes = fixture.pools[0].stats().live_bytes;
        assert_eq!(sleep(&mut fixture), live_bytes, "{number}");
        // The old copy is gone.
        assert_eq!(fixture.store.stats().in_use_bytes, UNIT);
        fixture.pools[0].wake().expect("room");
        fixture.check();
        fixture.end();
    }
}

#[test]
fn a_promise_that_is_broken_brings_the_older_contents() {
    let mut fixture = Fixture::new(manual(), &[1]);
    fixture.take(0, 0..2);
    let before = fixture.contents[0].clone();
    sleep(&mut fixture);
    fixture.pools[0].wake().expect("room");
    fixture.write(0, 0..1);
    assert_eq!(sleep(&mut fixture), 0);
    fixture.pools[0].wake().expect("room");
    fixture.contents[0] = before;
    fixture.check();
    // Without the promise nothing is lost.
    fixture.write(0, 0..1);
    fixture.sleep(0).expect("idle");
    fixture.pools[0].wake().expect("room");
    fixture.check();
    fixture.end();
}

#[test]
fn a_copy_can_be_given_up_while_the_pool_is_awake() {
    let mut fixture = Fixture::new(manual(), &[1]);
    fixture.take(0, 0..2);
    assert_eq!(fixture.pools[0].forget_copy(), Ok(0));
    sleep(&mut fixture);
    let asleep = VmmError::Asleep {
        asleep_bytes: 2 * PAGE,
        is_changing: false,
    };
    assert_eq!(fixture.pools[0].forget_copy(), Err(asleep));
    fixture.pools[0].wake().expect("room");
    assert_eq!(fixture.pools[0].forget_copy(), Ok(UNIT));
    assert_eq!(fixture.store.stats().in_use_bytes, 0);
    assert_eq!(sleep(&mut fixture), 2 * PAGE);
    fixture.pools[0].wake().expect("room");
    fixture.check();
    // Closing gives it back too.
    fixture.close(0);
    assert_eq!(fixture.store.stats().in_use_bytes, 0);
    fixture.end();
}

#[test]
fn a_sleep_that_is_refused_leaves_the_copy() {
    let mut fixture = Fixture::new(manual(), &[1]);
    fixture.take(0, 0..2);
    sleep(&mut fixture);
    fixture.pools[0].wake().expect("room");
    let pin = fixture.pools[0].pin_for_graph(0, 1).expect("live");
    let refused = fixture.pools[0].sleep(Keep::Constant(&fixture.store));
    refused.expect_err("pinned");
    drop(pin);
    assert_eq!(sleep(&mut fixture), 0);
    fixture.pools[0].wake().expect("room");
    fixture.check();
    fixture.end();
}
