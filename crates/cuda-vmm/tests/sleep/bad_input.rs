//! What keeps a pool awake, what a pool that sleeps refuses, and that nothing changes then.

use crate::common::{manual, turn};
use crate::fixture::{Fixture, PAGE, PAGES, UNIT};
use cuda_vmm::{CaptureGuard, Keep, Stream, VmmError, WakeOptions};
use std::sync::Arc;

/// Tries to put the first pool to sleep. It must be refused, with this error, and change nothing.
#[track_caller]
fn refused(fixture: &mut Fixture, error: &VmmError) {
    let before = (fixture.pools[0].stats(), fixture.store.stats());
    let books = fixture.simulated.books();
    for keep in [Keep::Host(&fixture.store), Keep::Nothing] {
        let found = fixture.pools[0].sleep(keep).expect_err("refused");
        assert_eq!(&found, error);
    }
    assert_eq!((fixture.pools[0].stats(), fixture.store.stats()), before);
    // Events and streams aside.
    let after = fixture.simulated.books();
    assert_eq!(after.physical_bytes, books.physical_bytes);
    assert_eq!(after.mappings, books.mappings);
    assert!(!fixture.pools[0].is_asleep());
}

fn kept(offset: usize, bytes: usize, by: &'static str) -> VmmError {
    VmmError::KeptAwake { offset, bytes, by }
}

fn with_pages() -> Fixture {
    let mut fixture = Fixture::new(manual(), &[1, 1]);
    fixture.take(0, 0..4);
    fixture.take(0, 6..8);
    fixture
}

#[test]
fn a_lease_keeps_a_pool_awake_until_its_token_is_released() {
    let _turn = turn();
    let mut fixture = with_pages();
    let token = Arc::new(());
    let lease = fixture.pools[0].lease(PAGE, 10, token.clone());
    lease.expect("live");
    refused(&mut fixture, &kept(PAGE, 10, "a lease"));
    fixture.check();
    drop(token);
    fixture.sleep(0).expect("idle");
    fixture.pools[0].wake().expect("room");
    fixture.check();
    fixture.end();
}

#[test]
fn what_was_freed_under_a_lease_keeps_a_pool_awake() {
    let _turn = turn();
    let mut fixture = with_pages();
    let token = Arc::new(());
    let lease = fixture.pools[0].lease(PAGE, PAGE, token.clone());
    lease.expect("live");
    fixture.free(0, 1..2);
    refused(&mut fixture, &kept(PAGE, PAGE, "a lease"));
    drop(token);
    fixture.sleep(0).expect("idle");
    fixture.pools[0].wake().expect("room");
    assert!(!fixture.pools[0].is_mapped(PAGE, 1));
    fixture.check();
    fixture.end();
}

#[test]
fn a_pin_keeps_a_pool_awake() {
    let _turn = turn();
    let mut fixture = with_pages();
    let pin = fixture.pools[0]
        .pin_for_graph(PAGE + 5, PAGE)
        .expect("live");
    refused(&mut fixture, &kept(PAGE, 2 * PAGE, "a pin"));
    fixture.check();
    drop(pin);
    fixture.sleep(0).expect("idle");
    fixture.end();
}

#[test]
fn a_capture_keeps_a_pool_awake() {
    let _turn = turn();
    let mut fixture = with_pages();
    let guard = CaptureGuard::new();
    refused(&mut fixture, &kept(0, 8 * PAGE, "a capture"));
    drop(guard);
    fixture.check();
    fixture.sleep(0).expect("idle");
    fixture.end();
}

#[test]
fn work_on_a_named_stream_keeps_a_pool_awake() {
    let _turn = turn();
    let mut fixture = with_pages();
    let simulator = fixture.simulated.simulator.clone();
    simulator.hold_work();
    // SAFETY: the page is live, and stays mapped until the work has run.
    unsafe { fixture.stream.memset(fixture.address(0, 0), 1, PAGE) }.expect("queued");
    refused(&mut fixture, &kept(0, 8 * PAGE, "queued work"));
    simulator.release_work();
    fixture.stream.synchronize().expect("done");
    fixture.write(0, 0..1);
    fixture.sleep(0).expect("idle");
    fixture.pools[0].wake().expect("room");
    fixture.check();
    fixture.end();
}

#[test]
fn work_of_streams_that_are_not_known_is_waited_for() {
    let _turn = turn();
    let mut fixture = with_pages();
    fixture.pools[0]
        .forget_stream(&fixture.stream)
        .expect("of this device");
    let simulator = fixture.simulated.simulator.clone();
    simulator.hold_work();
    // SAFETY: the page is live, and stays mapped until the work has run.
    unsafe { fixture.stream.memset(fixture.address(0, 0), 7, PAGE) }.expect("queued");
    std::thread::scope(|scope| {
        let pool = &mut fixture.pools[0];
        let store = &fixture.store;
        let sleeping = scope.spawn(|| pool.sleep(Keep::Host(store)));
        std::thread::sleep(core::time::Duration::from_millis(20));
        assert!(!sleeping.is_finished(), "it waits for the work");
        simulator.release_work();
        sleeping.join().expect("no panic").expect("idle");
    });
    fixture.pools[0].wake().expect("room");
    let mut found = [0; PAGE];
    // SAFETY: the page is live.
    unsafe { fixture.stream.read(fixture.address(0, 0), &mut found) }.expect("mapped");
    assert_eq!(found, [7; PAGE]);
    fixture.end();
}

#[test]
fn work_of_a_default_stream_which_cannot_be_asked_is_waited_for() {
    let _turn = turn();
    let mut fixture = with_pages();
    // SAFETY: the legacy default stream is always there.
    let legacy = unsafe { Stream::borrow(&fixture.simulated.device, core::ptr::null_mut()) };
    fixture.pools[0].use_stream(&legacy).expect("same device");
    fixture.sleep(0).expect("idle");
    fixture.pools[0].wake().expect("room");
    // SAFETY: the page is live, and stays mapped until the work has run.
    unsafe { legacy.memset(fixture.address(0, 0), 7, PAGE) }.expect("queued");
    fixture.sleep(0).expect("it waits");
    fixture.pools[0].wake().expect("room");
    let mut found = [0; PAGE];
    // SAFETY: the page is live.
    unsafe { fixture.stream.read(fixture.address(0, 0), &mut found) }.expect("mapped");
    assert_eq!(found, [7; PAGE]);
    drop(legacy);
    fixture.end();
}

#[test]
fn shared_memory_keeps_a_pool_awake() {
    let _turn = turn();
    let mut fixture = Fixture::new(manual().chunk_bytes_max(4 * PAGE), &[1, 1]);
    fixture.take(0, 0..32);
    let account = fixture.account(0).clone();
    let part = (&fixture.pools[0], &fixture.pools[1], 0, 32 * PAGE);
    account.share_many(&[part]).expect("whole chunks").keep();
    drop(account);
    let first = fixture.pools[0].sleep(Keep::Nothing).expect_err("shared");
    let VmmError::KeptAwake { offset, bytes, by } = first else {
        panic!("{first}");
    };
    assert_eq!((offset, by), (0, "shared memory"));
    assert!((PAGE..=4 * PAGE).contains(&bytes), "{bytes}");
    fixture.pools[1].deallocate(0, 32 * PAGE).expect("live");
    fixture.settle();
    fixture.sleep(0).expect("it is its own again");
    fixture.pools[0].wake().expect("room");
    fixture.check();
    fixture.end();
}

#[test]
fn a_store_without_room_refuses_before_anything_changes() {
    let _turn = turn();
    let mut fixture = with_pages();
    fixture.store.set_limit_bytes(UNIT).expect("this process");
    let taken = fixture.store.reserve(1).expect("room");
    let before = fixture.pools[0].stats();
    fixture.simulated.simulator.start_trace();
    let full = fixture.sleep(0).expect_err("no room");
    assert_eq!(
        full,
        VmmError::HostStoreFull {
            needed_bytes: UNIT,
            in_use_bytes: UNIT,
            limit_bytes: UNIT
        }
    );
    use cuda_vmm::sys::DriverFunction::{cuMemUnmap, cuMemcpyDtoHAsync};
    let calls = fixture.simulated.simulator.take_trace();
    assert!(
        !calls
            .iter()
            .any(|call| [cuMemUnmap, cuMemcpyDtoHAsync].contains(call))
    );
    assert_eq!(fixture.pools[0].stats(), before);
    drop(taken);
    fixture.sleep(0).expect("room now");
    fixture.pools[0].wake().expect("room");
    fixture.check();
    fixture.end();
}

#[test]
fn a_pool_that_sleeps_refuses_all_that_is_about_its_bytes() {
    let _turn = turn();
    let mut fixture = with_pages();
    fixture.sleep(0).expect("idle");
    let asleep = VmmError::Asleep {
        asleep_bytes: 6 * PAGE,
        is_changing: false,
    };
    let before = fixture.pools[0].stats();
    let account = fixture.account(0).clone();
    let [pool, other] = &mut fixture.pools[..] else {
        panic!("two pools");
    };
    other.allocate(50 * PAGE, PAGE).expect("room");
    for (offset, bytes) in [(0, PAGE), (40 * PAGE, PAGE), (4 * PAGE, 1)] {
        assert_eq!(pool.allocate(offset, bytes), Err(asleep.clone()));
        assert_eq!(pool.try_allocate(offset, bytes), Err(asleep.clone()));
        assert_eq!(pool.deallocate(offset, bytes), Err(asleep.clone()));
        let lease = pool.lease(offset, bytes, Arc::new(()));
        assert_eq!(lease, Err(asleep.clone()));
        let pin = pool.pin_for_graph(offset, bytes).map(drop);
        assert_eq!(pin, Err(asleep.clone()));
        let many = account.try_allocate_many(&[(pool, offset, bytes)]);
        assert_eq!(many.map(drop), Err(asleep.clone()));
        for (from, to) in [(&*pool, &*other), (&*other, &*pool)] {
            let shared = account.share_many(&[(from, to, offset, bytes)]);
            assert_eq!(shared.map(drop), Err(asleep.clone()), "{offset}");
        }
        assert_eq!(
            pool.make_private(offset, bytes).map(drop),
            Err(asleep.clone())
        );
        assert!(!pool.is_mapped(offset, bytes));
    }
    assert_eq!(pool.allocate_anywhere(PAGE, 1), Err(asleep.clone()));
    assert_eq!(pool.compact().map(drop), Err(asleep.clone()));
    assert_eq!(pool.sleep(Keep::Nothing).map(drop), Err(asleep));
    assert_eq!(pool.stats(), before);
    // What is out of range is that first or last, and never done.
    pool.allocate(PAGES * PAGE, 1).expect_err("out of range");
    pool.wake().expect("room");
    let awake = VmmError::Awake {
        live_bytes: 6 * PAGE,
    };
    assert_eq!(pool.wake(), Err(awake));
    drop(account);
    fixture.pools[1].deallocate(50 * PAGE, PAGE).expect("live");
    fixture.settle();
    fixture.check();
    fixture.end();
}

#[test]
fn an_order_beyond_the_addresses_is_refused() {
    let _turn = turn();
    let mut fixture = with_pages();
    fixture.sleep(0).expect("idle");
    let beyond = WakeOptions::new().first([0..1, PAGES * PAGE..PAGES * PAGE + 1]);
    assert_eq!(
        fixture.pools[0].wake_with(&beyond),
        Err(VmmError::OutOfRange {
            offset: PAGES * PAGE,
            bytes: 1,
            capacity_bytes: PAGES * PAGE
        })
    );
    let nothing = WakeOptions::new().first(core::iter::once(5..5));
    assert!(matches!(
        fixture.pools[0].wake_with(&nothing),
        Err(VmmError::ZeroSize { .. })
    ));
    let order = WakeOptions::new().first([6 * PAGE..PAGES * PAGE, 0..5]);
    fixture.pools[0].wake_with(&order).expect("room");
    fixture.check();
    fixture.end();
}
