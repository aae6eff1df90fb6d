//! Contents that come while the pool is awake already.

use crate::common::{manual, turn};
use crate::fixture::{Fixture, PAGE};
use core::time::Duration;
use cuda_vmm::{Arriving, Keep, Stream, VmmError, WakeOptions};
use std::time::Instant;

/// A pool with pages of its own, asleep.
fn asleep() -> Fixture {
    let mut fixture = Fixture::new(manual().park_bytes_max(1 << 30), &[1]);
    fixture.take(0, 0..9);
    fixture.take(0, 20..40);
    fixture.sleep(0).expect("idle");
    fixture
}

#[test]
fn a_pool_is_awake_before_its_contents_have_come() {
    let _turn = turn();
    let fixture = asleep();
    let held = fixture.simulated.hold_work();
    let arriving = fixture.pools[0].wake_streaming(&WakeOptions::new());
    let arriving = arriving.expect("room");
    assert!(!fixture.pools[0].is_asleep());
    assert!(fixture.pools[0].is_mapped(0, 9 * PAGE));
    let pool = &fixture.pools[0];
    assert_eq!(arriving.has_come(pool, 0, PAGE), Ok(false));
    // What is not live is not on its way.
    assert_eq!(arriving.has_come(pool, 10 * PAGE, PAGE), Ok(true));
    let stream = Stream::new(&fixture.simulated.device).expect("a stream");
    arriving
        .order_stream(&stream, pool, 20 * PAGE, PAGE)
        .expect("a fence");
    drop(held);
    // The stream comes after the copy of its page, though nobody waited for it.
    stream.synchronize().expect("done");
    assert_eq!(arriving.has_come(pool, 20 * PAGE, PAGE), Ok(true));
    arriving.finish().expect("no call fails");
    fixture.check();
    drop(stream);
    fixture.end();
}

#[test]
fn what_is_wanted_first_comes_first_and_a_limit_slows_the_rest() {
    let _turn = turn();
    let fixture = asleep();
    let begun = Instant::now();
    // The first page comes at once, and the next part when its second is over.
    let options = WakeOptions::new()
        .first([30 * PAGE..31 * PAGE, 2 * PAGE..3 * PAGE])
        .bytes_per_second(2 * PAGE as u64);
    let arriving = fixture.pools[0].wake_streaming(&options).expect("room");
    let pool = &fixture.pools[0];
    while !arriving.has_come(pool, 30 * PAGE, PAGE).expect("asked") {
        std::thread::yield_now();
    }
    assert_eq!(arriving.has_come(pool, 2 * PAGE, PAGE), Ok(false));
    assert_eq!(arriving.has_come(pool, 0, PAGE), Ok(false));
    while !arriving.has_come(pool, 2 * PAGE, PAGE).expect("asked") {
        std::thread::yield_now();
    }
    assert!(begun.elapsed() >= Duration::from_millis(500));
    assert_eq!(arriving.has_come(pool, 0, PAGE), Ok(false));
    arriving.finish().expect("no call fails");
    assert!(begun.elapsed() >= Duration::from_millis(1000));
    assert_eq!(fixture.store.stats().in_use_bytes, 0);
    fixture.check();
    fixture.end();
}

#[test]
fn a_limit_of_nothing_is_refused() {
    let fixture = asleep();
    let options = WakeOptions::new().bytes_per_second(0);
    let refused = fixture.pools[0].wake_with(&options);
    assert_eq!(refused, Err(VmmError::ZeroSize { what: "bandwidth" }));
    assert!(fixture.pools[0].is_asleep());
    fixture.pools[0].wake().expect("room");
    fixture.check();
    fixture.end();
}

/// Wakes the pool so that page 0 comes at once, and those from 20 on after a third of a second.
fn wake_slowly(fixture: &Fixture) -> Arriving {
    let options = WakeOptions::new()
        .first(core::iter::once(0..PAGE))
        .bytes_per_second(30 * PAGE as u64);
    fixture.pools[0].wake_streaming(&options).expect("room")
}

#[test]
fn what_is_freed_meanwhile_stays_mapped_until_the_copies_are_past() {
    let _turn = turn();
    let mut fixture = asleep();
    let arriving = wake_slowly(&fixture);
    // The named stream is idle, so only the copies keep the memory.
    fixture.free(0, 20..40);
    fixture.engine.step();
    fixture.engine.trim().expect("no call fails");
    assert_eq!(fixture.pools[0].stats().parts.retiring_bytes, 20 * PAGE);
    arriving.finish().expect("no call fails");
    fixture.settle();
    assert_eq!(fixture.pools[0].stats().parts.retiring_bytes, 0);
    fixture.engine.trim().expect("no call fails");
    assert!(!fixture.simulated.simulator.is_poisoned(0));
    fixture.check();
    fixture.end();
}

#[test]
fn contents_on_their_way_keep_a_pool_awake() {
    let _turn = turn();
    let mut fixture = asleep();
    let arriving = wake_slowly(&fixture);
    let refused = fixture.pools[0].sleep(Keep::Nothing);
    assert_eq!(
        refused.expect_err("not idle"),
        VmmError::KeptAwake {
            offset: 0,
            bytes: 40 * PAGE,
            by: "queued work"
        }
    );
    // The host bytes are in use as long.
    assert!(fixture.store.stats().in_use_bytes > 0);
    drop(arriving);
    assert_eq!(fixture.store.stats().in_use_bytes, 0);
    fixture.sleep(0).expect("idle");
    fixture.pools[0].wake().expect("room");
    fixture.check();
    fixture.end();
}

#[test]
fn a_pool_can_be_closed_while_its_contents_come() {
    let _turn = turn();
    let mut fixture = asleep();
    let simulator = fixture.simulated.simulator.clone();
    let arriving = wake_slowly(&fixture);
    let begun = Instant::now();
    fixture.close(0);
    assert!(begun.elapsed() >= Duration::from_millis(200), "it waits");
    arriving.finish().expect("no call fails");
    assert!(!simulator.is_poisoned(0));
    assert_eq!(fixture.store.stats().in_use_bytes, 0);
    fixture.end();
}

#[test]
fn a_copy_that_stays_is_used_again_after_its_contents_have_come() {
    let _turn = turn();
    let mut fixture = asleep();
    fixture.pools[0].wake().expect("room");
    let slept = fixture.pools[0].sleep(Keep::Constant(&fixture.store));
    assert_eq!(slept.expect("idle").copied_bytes, 29 * PAGE);
    let arriving = fixture.pools[0].wake_streaming(&WakeOptions::new());
    arriving.expect("room").finish().expect("no call fails");
    let slept = fixture.pools[0].sleep(Keep::Constant(&fixture.store));
    assert_eq!(slept.expect("idle").copied_bytes, 0);
    fixture.pools[0].wake().expect("room");
    fixture.check();
    fixture.end();
}
