//! Pools of one account that sleep and wake together.

use crate::common::manual;
use crate::fixture::{Fixture, PAGE, UNIT};
use cuda_vmm::{Keep, VmmError, WakeOptions};

/// Puts the first two pools to sleep: the first keeps its contents.
fn sleep_two(fixture: &mut Fixture) -> cuda_vmm::Result<cuda_vmm::Slept> {
    let account = fixture.account(0).clone();
    let [one, two, ..] = &mut fixture.pools[..] else {
        panic!("two pools");
    };
    account.sleep_many(&mut [(one, Keep::Host(&fixture.store)), (two, Keep::Nothing)])
}

fn wake_two(fixture: &Fixture) -> cuda_vmm::Result<()> {
    let pools = [&fixture.pools[0], &fixture.pools[1]];
    (fixture.account(0)).wake_many(&pools, &WakeOptions::new())
}

fn two() -> Fixture {
    let mut fixture = Fixture::new(manual().limit_bytes(24 * PAGE), &[1, 1, 2]);
    fixture.take(0, 0..6);
    fixture.take(1, 3..8);
    fixture
}

#[test]
fn pools_sleep_and_wake_together_each_in_its_way() {
    let mut fixture = two();
    let slept = sleep_two(&mut fixture).expect("idle");
    assert_eq!(
        (slept.given_bytes, slept.copied_bytes),
        (11 * PAGE, 6 * PAGE)
    );
    fixture.check();
    wake_two(&fixture).expect("room");
    fixture.write(1, 3..8);
    fixture.check();
    let counters = fixture.engine.counters();
    assert_eq!((counters.sleeps, counters.wakes), (2, 2));
    let awake = wake_two(&fixture).expect_err("awake");
    assert!(matches!(awake, VmmError::Awake { .. }));
    assert_eq!(fixture.engine.counters(), counters, "a refusal is none");
    fixture.end();
}

#[test]
fn one_that_cannot_sleep_keeps_the_other_awake() {
    let mut fixture = two();
    let pin = fixture.pools[1].pin_for_graph(3 * PAGE, 1).expect("live");
    let before = [0, 1].map(|pool| fixture.pools[pool].stats());
    let refused = sleep_two(&mut fixture).expect_err("pinned");
    assert!(matches!(refused, VmmError::KeptAwake { by: "a pin", .. }));
    assert_eq!([0, 1].map(|pool| fixture.pools[pool].stats()), before);
    assert_eq!(fixture.store.stats().in_use_bytes, 0);
    drop(pin);
    fixture.check();
    fixture.end();
}

#[test]
fn a_wake_without_room_for_all_wakes_none() {
    let mut fixture = two();
    sleep_two(&mut fixture).expect("idle");
    fixture.take(2, 0..16);
    let missing = wake_two(&fixture).expect_err("no room");
    assert_eq!(missing.shortfall_bytes(), 3 * PAGE, "{missing}");
    fixture.check();
    assert_eq!(fixture.engine.stats().committed_bytes, 16 * PAGE);
    // One alone fits.
    fixture.pools[0].wake().expect("room");
    fixture.free(2, 0..16);
    fixture.settle();
    // The call is about both, and one is awake.
    let awake = wake_two(&fixture).expect_err("awake");
    assert_eq!(
        awake,
        VmmError::Awake {
            live_bytes: 6 * PAGE
        }
    );
    assert!(fixture.pools[1].is_asleep());
    fixture.pools[1].wake().expect("room");
    fixture.write(1, 3..8);
    fixture.check();
    fixture.end();
}

#[test]
fn pools_of_others_and_the_same_pool_twice_are_refused() {
    let mut fixture = two();
    let account = fixture.account(0).clone();
    let foreign = VmmError::ForeignAccount {
        expected: "1".into(),
        found: "2".into(),
    };
    let [one, _, three] = &mut fixture.pools[..] else {
        panic!("three pools");
    };
    let parts = &mut [(&mut *one, Keep::Nothing), (&mut *three, Keep::Nothing)];
    assert_eq!(account.sleep_many(parts), Err(foreign.clone()));
    let options = WakeOptions::new();
    assert_eq!(account.wake_many(&[one, three], &options), Err(foreign));
    assert_eq!(account.sleep_many(&mut []).expect("nothing").given_bytes, 0);
    assert_eq!(account.wake_many(&[], &options), Ok(()));
    fixture.sleep(0).expect("idle");
    let one = &fixture.pools[0];
    let twice = account.wake_many(&[one, one], &options);
    assert_eq!(
        twice,
        Err(VmmError::Asleep {
            asleep_bytes: 6 * PAGE,
            is_changing: true
        })
    );
    assert_eq!(one.stats().host_bytes, UNIT);
    one.wake().expect("room");
    drop(account);
    fixture.check();
    fixture.end();
}

#[test]
fn contents_of_several_pools_stream_pool_by_pool() {
    let mut fixture = two();
    let account = fixture.account(0).clone();
    let [one, two, ..] = &mut fixture.pools[..] else {
        panic!("two pools");
    };
    let store = &fixture.store;
    let parts = &mut [(one, Keep::Host(store)), (two, Keep::Host(store))];
    account.sleep_many(parts).expect("idle");
    let held = fixture.simulated.hold_work();
    let pools = [&fixture.pools[1], &fixture.pools[0]];
    let arriving = account.wake_many_streaming(&pools, &WakeOptions::new());
    let arriving = arriving.expect("room");
    for pool in &fixture.pools[..2] {
        assert_eq!(arriving.has_come(pool, 3 * PAGE, PAGE), Ok(false));
    }
    // Nothing of the third is on its way.
    assert_eq!(arriving.has_come(&fixture.pools[2], 0, PAGE), Ok(true));
    drop(held);
    arriving.finish().expect("no call fails");
    drop(account);
    fixture.check();
    fixture.end();
}
