//! Pools that give up their memory and have it again at the same addresses.

mod common;

#[path = "sleep/bad_input.rs"]
mod bad_input;
#[path = "sleep/constant.rs"]
mod constant;
#[path = "sleep/faults.rs"]
mod faults;
#[path = "sleep/fixture.rs"]
mod fixture;
#[path = "sleep/many.rs"]
mod many;
#[path = "sleep/random.rs"]
mod random;
#[path = "sleep/streaming.rs"]
mod streaming;

use common::manual;
use cuda_vmm::{Keep, PoolOptions, VirtualMemoryPool, VmmError, WakeOptions};
use fixture::{Fixture, PAGE, PAGES, UNIT};

#[test]
fn contents_come_back_to_the_same_addresses() {
    let mut fixture = Fixture::new(manual(), &[1]);
    fixture.take(0, 0..3);
    fixture.take(0, 5..20);
    fixture.free(0, 8..9);
    fixture.settle();
    let before = fixture.pools[0].stats();
    let slept = fixture.sleep(0).expect("nothing keeps it awake");
    assert_eq!(slept.copied_bytes, 17 * PAGE);
    assert_eq!(slept.given_bytes, before.committed_bytes);
    assert_eq!(slept.quarantined_bytes, 0);
    let stats = fixture.pools[0].stats();
    assert_eq!((stats.committed_bytes, stats.live_bytes), (0, 0));
    assert_eq!((stats.asleep_bytes, stats.host_bytes), (17 * PAGE, UNIT));
    assert!(fixture.pools[0].is_asleep());
    assert!(!fixture.pools[0].is_mapped(0, PAGE));
    assert_eq!(fixture.simulated.books().physical_bytes, 0);
    assert_eq!(fixture.simulated.books().mappings, 0);
    fixture.check();
    fixture.pools[0].wake().expect("room");
    assert!(!fixture.pools[0].is_asleep());
    let stats = fixture.pools[0].stats();
    assert_eq!(stats.live_bytes, 17 * PAGE);
    assert_eq!((stats.asleep_bytes, stats.host_bytes), (0, 0));
    assert_eq!(fixture.store.stats().in_use_bytes, 0);
    assert!(!fixture.pools[0].is_mapped(8 * PAGE, 1));
    fixture.check();
    // What is there works as before.
    fixture.free(0, 5..7);
    fixture.take(0, 8..9);
    fixture.check();
    fixture.end();
}

#[test]
fn contents_that_are_not_kept_take_no_host_memory() {
    let mut fixture = Fixture::new(manual(), &[1]);
    fixture.take(0, 0..9);
    let slept = fixture.pools[0].sleep(Keep::Nothing).expect("idle");
    assert_eq!(slept.copied_bytes, 0);
    let stats = fixture.pools[0].stats();
    assert_eq!((stats.asleep_bytes, stats.host_bytes), (9 * PAGE, 0));
    assert_eq!(fixture.store.stats().registered_bytes, 0);
    fixture.pools[0].wake().expect("room");
    assert!(fixture.pools[0].is_mapped(0, 9 * PAGE));
    fixture.write(0, 0..9);
    fixture.check();
    fixture.end();
}

#[test]
fn parts_of_pages_and_pools_without_a_byte_sleep_too() {
    let mut fixture = Fixture::new(manual(), &[1, 1]);
    let pool = &fixture.pools[0];
    let first = pool.allocate(10, 20).expect("room");
    let second = pool.allocate(PAGE - 1, 2).expect("room");
    // SAFETY: both are live.
    unsafe {
        fixture.stream.write(first, &[7; 20]).expect("written");
        fixture.stream.write(second, &[8, 9]).expect("written");
    }
    for pool in [0, 1] {
        fixture.sleep(pool).expect("idle");
    }
    // One byte takes a whole huge page of the host, and none takes nothing.
    let stats = fixture.pools[0].stats();
    assert_eq!((stats.asleep_bytes, stats.host_bytes), (2 * PAGE, UNIT));
    let stats = fixture.pools[1].stats();
    assert_eq!((stats.asleep_bytes, stats.host_bytes), (0, 0));
    for pool in &fixture.pools {
        pool.wake().expect("room");
    }
    let (mut one, mut two) = ([0; 20], [0; 2]);
    // SAFETY: both are live.
    unsafe {
        fixture.stream.read(first, &mut one).expect("mapped");
        fixture.stream.read(second, &mut two).expect("mapped");
    }
    assert_eq!((one, two), ([7; 20], [8, 9]));
    assert_eq!(fixture.pools[0].stats().live_bytes, 22);
    fixture.end();
}

#[test]
fn others_have_the_memory_meanwhile_and_a_wake_without_room_is_tried_again() {
    let mut fixture = Fixture::new(manual().limit_bytes(16 * PAGE), &[1, 2]);
    fixture.take(0, 0..12);
    fixture.sleep(0).expect("idle");
    fixture.take(1, 0..16);
    assert_eq!(fixture.engine.stats().committed_bytes, 16 * PAGE);
    let missing = fixture.pools[0].wake().expect_err("no room");
    assert_eq!(
        missing,
        VmmError::OutOfPhysicalMemory {
            asked_bytes: 12 * PAGE,
            free_bytes: 0,
            retiring_bytes: 0,
            reclaimable_bytes: 0,
            limit_bytes: 16 * PAGE,
        }
    );
    assert!(missing.is_retryable());
    // Others owe it, as they owe what an allocation was refused.
    assert_eq!(fixture.account(1).owed_bytes(), 12 * PAGE);
    assert_eq!(fixture.pools[0].stats().asleep_bytes, 12 * PAGE);
    fixture.check();
    fixture.free(1, 4..16);
    fixture.settle();
    fixture.pools[0].wake().expect("room now");
    assert_eq!(fixture.account(1).owed_bytes(), 0);
    fixture.check();
    fixture.end();
}

#[test]
fn a_wake_waits_as_long_as_it_is_told_for_what_another_gives_back() {
    let mut fixture = Fixture::new(manual().limit_bytes(16 * PAGE), &[1, 2]);
    fixture.take(0, 0..12);
    fixture.sleep(0).expect("idle");
    fixture.take(1, 0..16);
    let (fixture_pools, stream) = (&fixture.pools, &fixture.stream);
    std::thread::scope(|scope| {
        let waking = scope.spawn(|| {
            let options = WakeOptions::new().timeout(crate::common::PATIENCE);
            fixture_pools[0].wake_with(&options)
        });
        // It stands in the line like an allocation.
        while fixture.account(1).owed_bytes() < 12 * PAGE {
            std::thread::yield_now();
        }
        assert!(fixture_pools[0].is_asleep());
        let again = fixture_pools[0].wake().expect_err("one wakes it");
        assert_eq!(
            again,
            VmmError::Asleep {
                asleep_bytes: 12 * PAGE,
                is_changing: true
            }
        );
        fixture_pools[1].deallocate(0, 12 * PAGE).expect("live");
        stream.synchronize().expect("done");
        waking.join().expect("no panic").expect("room");
    });
    fixture.contents[1].retain(|page, _| *page >= 12);
    fixture.check();
    fixture.end();
}

#[test]
fn a_limit_that_was_lowered_meanwhile_is_an_error_that_says_so() {
    let mut fixture = Fixture::new(manual().limit_bytes(16 * PAGE), &[1]);
    fixture.take(0, 0..12);
    fixture.sleep(0).expect("idle");
    fixture
        .engine
        .set_limit_bytes(8 * PAGE)
        .expect("no guarantee");
    let error = fixture.pools[0].wake().expect_err("too large");
    assert!(error.is_permanent(), "{error}");
    assert!(
        matches!(error, VmmError::OutOfPhysicalMemory { asked_bytes, limit_bytes, .. }
            if (asked_bytes, limit_bytes) == (12 * PAGE, 8 * PAGE)),
        "{error}"
    );
    fixture.engine.set_limit_bytes(16 * PAGE).expect("up again");
    fixture.pools[0].wake().expect("room");
    fixture.check();
    fixture.end();
}

#[test]
fn closing_a_pool_that_sleeps_frees_its_host_bytes() {
    let mut fixture = Fixture::new(manual(), &[1, 1]);
    fixture.take(0, 0..5);
    fixture.sleep(0).expect("idle");
    assert_eq!(fixture.store.stats().in_use_bytes, UNIT);
    fixture.close(0);
    assert_eq!(fixture.store.stats().in_use_bytes, 0);
    assert_eq!(fixture.engine.stats().ranges, 1);
    assert_eq!(fixture.engine.stats().asleep_bytes, 0);
    fixture.end();
}

#[test]
fn a_pool_whose_account_is_closed_does_not_wake() {
    let mut fixture = Fixture::new(manual(), &[1]);
    fixture.take(0, 0..5);
    fixture.sleep(0).expect("idle");
    fixture.account(0).close();
    assert_eq!(fixture.pools[0].wake(), Err(VmmError::Closed));
    assert!(fixture.pools[0].is_asleep());
    fixture.close(0);
    assert_eq!(fixture.store.stats().in_use_bytes, 0);
    fixture.end();
}

#[test]
fn the_numbers_say_what_sleeps() {
    let mut fixture = Fixture::new(manual(), &[1, 2]);
    fixture.take(0, 0..5);
    fixture.take(1, 0..3);
    fixture.sleep(0).expect("idle");
    let snapshot = fixture.engine.snapshot();
    let engine = snapshot.engine;
    assert_eq!((engine.asleep_bytes, engine.host_bytes), (5 * PAGE, UNIT));
    let of = |name: &str| {
        let mut accounts = snapshot.accounts.iter();
        let account = accounts.find(|account| account.name == name);
        account.expect("it is open").stats
    };
    let (one, two) = (of("1"), of("2"));
    assert_eq!((one.asleep_bytes, one.host_bytes), (5 * PAGE, UNIT));
    assert_eq!((two.asleep_bytes, two.host_bytes), (0, 0));
    assert_eq!(fixture.account(0).stats(), one);
    let text = snapshot.prometheus();
    for line in [
        "cuda_vmm_engine_asleep_bytes 20480",
        "cuda_vmm_engine_host_bytes 2097152",
        "cuda_vmm_asleep_bytes{model=\"1\"} 20480",
        "cuda_vmm_host_bytes{model=\"2\"} 0",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}: {text}");
    }
    let text = "; 20 KiB asleep, 2 MiB on the host";
    assert!(engine.to_string().ends_with(text), "{engine}");
    assert!(one.to_string().ends_with(text), "{one}");
    let pool = fixture.pools[0].stats();
    assert!(pool.to_string().ends_with(text), "{pool}");
    assert!(!two.to_string().contains("asleep"), "{two}");
    fixture.end();
}

#[test]
fn the_generation_counts_memory_that_goes_from_behind_addresses() {
    let mut fixture = Fixture::new(manual().park_bytes_max(PAGES * PAGE), &[1]);
    let of = |fixture: &Fixture| fixture.pools[0].generation().expect("open");
    fixture.take(0, 0..4);
    let first = of(&fixture);
    // More memory elsewhere is no change of what is there.
    fixture.take(0, 8..12);
    assert_eq!(of(&fixture), first);
    fixture.sleep(0).expect("idle");
    let asleep = of(&fixture);
    assert!(asleep > first);
    fixture.pools[0].wake().expect("room");
    fixture.check();
    assert_eq!(of(&fixture), asleep);
    fixture.free(0, 8..12);
    fixture.settle();
    assert_eq!(of(&fixture), asleep, "it is parked");
    fixture.engine.trim().expect("no call fails");
    assert!(of(&fixture) > asleep);
    fixture.end();
}

#[test]
fn a_wake_is_no_allocation_of_the_owners() {
    let mut fixture = Fixture::new(manual(), &[1]);
    fixture.take(0, 0..4);
    fixture.take(0, 8..12);
    let before = fixture.pools[0].counters();
    fixture.sleep(0).expect("idle");
    fixture.pools[0].wake().expect("room");
    assert_eq!(fixture.pools[0].counters(), before);
    fixture.end();
}

#[test]
fn each_run_of_live_bytes_has_one_handle_again() {
    let mut fixture = Fixture::new(manual(), &[1]);
    let options = PoolOptions::new().single_handle(true);
    let account = fixture.account(0).clone();
    let pool = VirtualMemoryPool::on_account(&account, PAGES * PAGE, PAGE, options);
    let mut pool = pool.expect("addresses");
    pool.allocate(0, 3 * PAGE).expect("room");
    pool.allocate(5 * PAGE, 20 * PAGE).expect("room");
    assert_eq!(pool.stats().chunks, 2);
    pool.sleep(Keep::Host(&fixture.store)).expect("idle");
    pool.wake().expect("room");
    let stats = pool.stats();
    assert_eq!((stats.chunks, stats.live_bytes), (2, 23 * PAGE));
    drop((pool, account));
    fixture.take(0, 0..1);
    fixture.check();
    fixture.end();
}

#[test]
fn memory_that_is_being_overwritten_for_the_cache_is_waited_for() {
    let mut fixture = Fixture::new(manual().cache_bytes_max(1 << 30), &[1]);
    fixture.take(0, 0..8);
    fixture.free(0, 2..5);
    fixture.stream.synchronize().expect("done");
    // It begins to overwrite what was freed.
    fixture.engine.step();
    fixture.sleep(0).expect("idle");
    fixture.engine.trim().expect("no call fails");
    assert_eq!(fixture.engine.stats().committed_bytes, 0);
    fixture.pools[0].wake().expect("room");
    fixture.check();
    fixture.end();
}

#[test]
fn memory_made_ahead_goes_first_and_comes_back_after() {
    let mut fixture = Fixture::with_ahead(manual(), &[1], 4 * PAGE);
    fixture.take(0, 0..4);
    fixture.engine.step();
    assert_eq!(fixture.pools[0].stats().parts.ahead_bytes, 4 * PAGE);
    fixture.sleep(0).expect("idle");
    fixture.engine.step();
    assert_eq!(fixture.engine.stats().committed_bytes, 0);
    fixture.pools[0].wake().expect("room");
    fixture.engine.step();
    assert_eq!(fixture.pools[0].stats().parts.ahead_bytes, 4 * PAGE);
    fixture.check();
    fixture.end();
}
