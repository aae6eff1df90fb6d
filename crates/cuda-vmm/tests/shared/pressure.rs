//! What models owe, how they learn of it, and giving back.

use crate::common::{ModelOptions, Models, PAGE, Simulated, failure, manual};
use crate::{CAPACITY, LIMIT, pool};
use cuda_vmm::sim::Fault;
use cuda_vmm::sys::{CUDA_ERROR_OPERATING_SYSTEM, DriverFunction};
use cuda_vmm::{EngineOptions, Stream, VirtualMemoryPool};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Wake;

/// A pool of eight pages and models of these names and priorities.
fn models<const COUNT: usize>(
    simulated: &Simulated,
    options: EngineOptions,
    models: [(&str, i32); COUNT],
) -> (Models, [Arc<VirtualMemoryPool>; COUNT]) {
    let pool = pool(&simulated.device, options.limit_bytes(LIMIT));
    let handles = models.map(|(model, priority)| {
        let options = ModelOptions {
            priority,
            ..ModelOptions::new(CAPACITY)
        };
        pool.register_model_with(model, options).expect("addresses");
        pool.model(model).expect("registered")
    });
    (pool, handles)
}

/// Counts how often it is woken, and looks at a pool each time, which only works without a lock.
struct Counts {
    woken: AtomicUsize,
    pool: Models,
}

impl Wake for Counts {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        assert!(self.pool.stats().committed_bytes <= LIMIT);
        self.woken.fetch_add(1, Ordering::SeqCst);
    }
}

/// Panics when it is woken and when it is dropped.
struct Panics;

impl Wake for Panics {
    fn wake(self: Arc<Self>) {
        panic!("woken");
    }
}

impl Drop for Panics {
    fn drop(&mut self) {
        panic!("dropped");
    }
}

#[test]
fn a_refused_allocation_is_owed_by_the_lowest_priority_first() {
    let simulated = Simulated::default();
    let (pool, [low, middle, high, asks]) = models(
        &simulated,
        manual(),
        [("low", -1), ("middle", 0), ("high", 2), ("asks", 1)],
    );
    low.allocate(0, 2 * PAGE).expect("room");
    middle.allocate(0, 3 * PAGE).expect("room");
    high.allocate(0, 3 * PAGE).expect("room");
    let owed = || [&low, &middle, &high, &asks].map(|model| model.account().owed_bytes() / PAGE);
    asks.try_allocate(0, PAGE).expect_err("nothing is free");
    assert_eq!(owed(), [1, 0, 0, 0]);
    asks.allocate(0, 4 * PAGE).expect_err("nothing is free");
    assert_eq!(owed(), [2, 2, 0, 0], "in place of what was refused before");
    asks.allocate(0, 8 * PAGE).expect_err("nothing is free");
    assert_eq!(owed(), [2, 3, 0, 0], "never by a higher priority");
    let quota = pool.quota("middle").expect("registered");
    pool.set_quota("middle", quota.guarantee_bytes(2 * PAGE))
        .expect("it holds more");
    assert_eq!(owed(), [2, 1, 0, 0], "never below a guarantee");
    low.deallocate(0, PAGE).expect("live");
    assert_eq!(owed(), [1, 1, 0, 0], "what is freed counts at once");
    asks.allocate(0, PAGE).expect("was given back");
    assert_eq!(
        owed(),
        [0, 0, 0, 0],
        "a model that got memory asks for no more"
    );
    asks.try_allocate(PAGE, PAGE).expect_err("nothing is free");
    assert_eq!(owed(), [1, 0, 0, 0]);
    pool.unregister_model("asks").expect("registered");
    assert_eq!(owed(), [0, 0, 0, 0]);
}

#[test]
fn no_model_owes_what_none_could_give() {
    let simulated = Simulated::default();
    let (pool, [a, b]) = models(&simulated, manual(), [("a", 0), ("b", 0)]);
    a.allocate(0, 4 * PAGE).expect("room");
    b.try_allocate(0, 9 * PAGE).expect_err("more than there is");
    assert_eq!(a.account().owed_bytes(), 0, "it can never be had");
    let quota = pool.quota("b").expect("registered");
    pool.set_quota("b", quota.ceiling_bytes(2 * PAGE))
        .expect("it can hold");
    b.allocate(0, 2 * PAGE).expect("room");
    b.try_allocate(2 * PAGE, PAGE).expect_err("at its ceiling");
    assert_eq!(a.account().owed_bytes(), 0, "others' memory would not help");
}

#[test]
fn a_waker_is_woken_without_a_lock_each_time_more_is_owed() {
    let simulated = Simulated::default();
    let (pool, [holds, asks]) = models(&simulated, manual(), [("holds", 0), ("asks", 0)]);
    let counts = Arc::new(Counts {
        woken: AtomicUsize::new(0),
        pool: pool.clone(),
    });
    let woken = || counts.woken.load(Ordering::SeqCst);
    holds.account().set_owed_waker(Some(counts.clone().into()));
    holds.allocate(0, 8 * PAGE).expect("room");
    assert_eq!(woken(), 0);
    asks.try_allocate(0, 2 * PAGE).expect_err("nothing is free");
    assert_eq!((woken(), holds.account().owed_bytes()), (1, 2 * PAGE));
    asks.try_allocate(0, 2 * PAGE).expect_err("nothing is free");
    assert_eq!(woken(), 1, "no more than before");
    asks.try_allocate(0, 3 * PAGE).expect_err("nothing is free");
    assert_eq!(woken(), 2);
    holds.deallocate(0, 3 * PAGE).expect("live");
    assert_eq!((woken(), holds.account().owed_bytes()), (2, 0));
    asks.try_allocate(0, 3 * PAGE).expect("was given back");
    holds.account().set_owed_waker(None);
    asks.try_allocate(3 * PAGE, PAGE)
        .expect_err("nothing is free");
    assert_eq!((woken(), holds.account().owed_bytes()), (2, PAGE));
    // Only the test still holds it.
    assert_eq!(Arc::strong_count(&counts), 1);
}

#[test]
fn a_panic_in_a_waker_harms_no_caller() {
    let simulated = Simulated::default();
    let (pool, [holds, asks]) = models(&simulated, manual(), [("holds", 0), ("asks", 0)]);
    holds
        .account()
        .set_owed_waker(Some(Arc::new(Panics).into()));
    holds.allocate(0, 8 * PAGE).expect("room");
    let error = asks.try_allocate(0, PAGE).expect_err("nothing is free");
    assert!(error.is_retryable(), "{error}");
    assert_eq!(holds.account().owed_bytes(), PAGE);
    holds
        .account()
        .set_owed_waker(Some(Arc::new(Panics).into()));
    holds.account().set_owed_waker(None);
    holds
        .account()
        .set_owed_waker(Some(Arc::new(Panics).into()));
    holds.deallocate(0, PAGE).expect("live");
    asks.try_allocate(0, PAGE).expect("was given back");
    pool.unregister_model("holds").expect("registered");
    drop(holds);
    asks.try_allocate(PAGE, 7 * PAGE).expect("was given back");
}

#[test]
fn giving_back_returns_what_the_model_itself_has_parked_or_ahead() {
    let simulated = Simulated::default();
    let options = manual().park_bytes_max(LIMIT).limit_bytes(LIMIT);
    let pool = pool(&simulated.device, options);
    let ahead = ModelOptions {
        ahead_bytes_max: PAGE,
        ..ModelOptions::new(CAPACITY)
    };
    for model in ["a", "b"] {
        pool.register_model_with(model, ahead).expect("addresses");
        pool.allocate_for_model_at(model, 0, 3 * PAGE)
            .expect("room");
    }
    pool.engine().step();
    for model in ["a", "b"] {
        pool.deallocate_for_model(model, 0, 2 * PAGE).expect("live");
    }
    pool.engine().step();
    let parts = |model: &str| {
        let stats = pool.model_stats(model).expect("registered");
        (
            stats.live_bytes,
            stats.parts.parked_bytes,
            stats.parts.ahead_bytes,
        )
    };
    assert_eq!(parts("a"), (PAGE, 2 * PAGE, PAGE));
    let a = pool.model("a").expect("registered");
    assert_eq!(a.account().give_back(), Ok(3 * PAGE));
    assert_eq!(parts("a"), (PAGE, 0, 0));
    assert_eq!(parts("b"), (PAGE, 2 * PAGE, PAGE));
    assert_eq!(simulated.books().physical_bytes, 5 * PAGE);
    assert_eq!(a.account().give_back(), Ok(0));
}

#[test]
fn what_the_driver_will_not_take_back_is_retried_and_still_held() {
    for refused in [DriverFunction::cuMemUnmap, DriverFunction::cuMemRelease] {
        let simulated = Simulated::default();
        let (pool, [a]) = models(&simulated, manual().park_bytes_max(LIMIT), [("a", 0)]);
        a.allocate(0, 2 * PAGE).expect("room");
        a.deallocate(0, 2 * PAGE).expect("live");
        pool.engine().step();
        let fault = Fault::always(refused, CUDA_ERROR_OPERATING_SYSTEM);
        simulated.simulator.inject(fault);
        let expected = match refused {
            DriverFunction::cuMemUnmap => failure!(cuMemUnmap, CUDA_ERROR_OPERATING_SYSTEM),
            _ => failure!(cuMemRelease, CUDA_ERROR_OPERATING_SYSTEM),
        };
        assert_eq!(a.account().give_back(), Err(expected));
        assert_eq!(a.stats().parts.quarantined_bytes, 2 * PAGE);
        simulated.simulator.clear_faults();
        assert_eq!(pool.trim(), Ok(2 * PAGE));
        assert_eq!(simulated.books().physical_bytes, 0);
    }
}

#[test]
fn a_closed_model_owes_nothing_and_gives_nothing_back() {
    let simulated = Simulated::default();
    let (pool, [holds, asks]) = models(&simulated, manual(), [("holds", 0), ("asks", 0)]);
    holds.allocate(0, 8 * PAGE).expect("room");
    asks.try_allocate(0, PAGE).expect_err("nothing is free");
    assert_eq!(holds.account().owed_bytes(), PAGE);
    pool.unregister_model("holds").expect("registered");
    assert_eq!(holds.account().owed_bytes(), 0);
    assert_eq!(holds.account().give_back(), Ok(0), "all is live");
    assert_eq!(pool.model_owed_bytes("holds"), None);
    let error = asks.try_allocate(0, 8 * PAGE).expect_err("all is live");
    assert_eq!(error.shortfall_bytes(), 8 * PAGE);
    assert_eq!(holds.account().owed_bytes(), 0, "it is closed");
    drop(holds);
    asks.try_allocate(0, 8 * PAGE).expect("all is back");
}

#[test]
fn leased_memory_is_owed_until_its_lease_ends() {
    let simulated = Simulated::default();
    let (_pool, [holds, asks]) = models(&simulated, manual(), [("holds", 0), ("asks", 0)]);
    let stream = Stream::new(&simulated.device).expect("a stream");
    holds.use_stream(&stream).expect("of this device");
    holds.allocate(0, 8 * PAGE).expect("room");
    let token = Arc::new(());
    holds.lease(0, 2 * PAGE, token.clone()).expect("live");
    holds.deallocate(0, 2 * PAGE).expect("live");
    asks.try_allocate(0, 2 * PAGE).expect_err("nothing is free");
    assert_eq!(holds.account().owed_bytes(), 2 * PAGE);
    drop(token);
    asks.try_allocate(0, 2 * PAGE).expect("the lease is over");
    assert_eq!(holds.account().owed_bytes(), 0);
}

#[test]
fn what_a_model_owes_is_not_made_ahead_for_it() {
    let simulated = Simulated::default();
    let pool = pool(&simulated.device, manual().limit_bytes(LIMIT));
    let ahead = ModelOptions {
        ahead_bytes_max: 2 * PAGE,
        ..ModelOptions::new(CAPACITY)
    };
    pool.register_model_with("holds", ahead).expect("addresses");
    pool.register_model("asks", CAPACITY).expect("addresses");
    let [holds, asks] = ["holds", "asks"].map(|model| pool.model(model).expect("registered"));
    holds.allocate(0, 5 * PAGE).expect("room");
    asks.try_allocate(0, 4 * PAGE)
        .expect_err("three pages are free");
    assert_eq!(holds.account().owed_bytes(), PAGE);
    assert_eq!(
        pool.engine().step().prefetched_bytes,
        0,
        "though there is room"
    );
    holds.deallocate(4 * PAGE, PAGE).expect("live");
    asks.try_allocate(0, 2 * PAGE).expect("there is room");
    holds.allocate(4 * PAGE, PAGE).expect("there is room");
    assert_eq!(holds.account().owed_bytes(), 0);
    assert_eq!(pool.engine().step().prefetched_bytes, PAGE);
}

/// Parked memory counts as given back, so a model that takes it again owes it again, though that
/// needs no other memory.
#[test]
fn parked_memory_that_is_taken_back_is_owed_again() {
    let simulated = Simulated::default();
    let options = manual().park_bytes_max(LIMIT);
    let (pool, [holds, asks]) = models(&simulated, options, [("holds", 0), ("asks", 0)]);
    holds.allocate(0, 8 * PAGE).expect("room");
    asks.try_allocate(0, 4 * PAGE).expect_err("nothing is free");
    holds.deallocate(0, 2 * PAGE).expect("live");
    pool.engine().step();
    assert_eq!(pool.stats().parts.parked_bytes, 2 * PAGE);
    assert_eq!(holds.account().owed_bytes(), 2 * PAGE);
    holds.allocate(0, PAGE).expect("parked");
    assert_eq!(holds.account().owed_bytes(), 3 * PAGE);
}

/// Memory that was made ahead for one model is given up for any other, so no model owes more
/// because of it.
#[test]
fn what_is_made_ahead_counts_as_free() {
    let simulated = Simulated::default();
    let pool = pool(&simulated.device, manual().limit_bytes(LIMIT));
    let ahead = ModelOptions {
        ahead_bytes_max: 2 * PAGE,
        priority: 1,
        ..ModelOptions::new(CAPACITY)
    };
    pool.register_model_with("ahead", ahead).expect("addresses");
    for model in ["holds", "asks"] {
        pool.register_model(model, CAPACITY).expect("addresses");
    }
    pool.allocate_for_model("ahead", 2 * PAGE).expect("room");
    pool.allocate_for_model("holds", 4 * PAGE).expect("room");
    let asks = pool.model("asks").expect("registered");
    asks.try_allocate(0, 5 * PAGE)
        .expect_err("two pages are free");
    assert_eq!(pool.model_owed_bytes("holds"), Some(3 * PAGE));
    assert_eq!(pool.engine().step().prefetched_bytes, 2 * PAGE);
    assert_eq!(pool.model_owed_bytes("holds"), Some(3 * PAGE));
}

#[test]
fn giving_back_looks_what_the_device_has_finished_with() {
    let simulated = Simulated::default();
    let (_pool, [a]) = models(&simulated, manual(), [("a", 0)]);
    a.allocate(0, 2 * PAGE).expect("room");
    a.deallocate(0, 2 * PAGE).expect("live");
    simulated.device.synchronize().expect("nothing runs");
    assert_eq!(a.account().give_back(), Ok(2 * PAGE));
}

/// Parked memory that is pinned for a graph is given up for no other model, so its model owes it.
#[test]
fn what_a_pin_keeps_does_not_count_as_given_back() {
    let simulated = Simulated::default();
    let options = manual().park_bytes_max(LIMIT);
    let (pool, [a]) = models(&simulated, options, [("a", 0)]);
    a.allocate(0, 3 * PAGE).expect("room");
    let pin = a.pin_for_graph(0, 2 * PAGE).expect("live");
    a.deallocate(0, 3 * PAGE).expect("live");
    simulated.device.synchronize().expect("nothing runs");
    pool.engine().step();
    assert_eq!(pool.stats().parts.parked_bytes, 3 * PAGE);
    let quota = pool.quota("a").expect("registered");
    pool.set_quota("a", quota.ceiling_bytes(0))
        .expect("downwards");
    assert_eq!(a.account().owed_bytes(), 2 * PAGE);
    drop(pin);
    pool.engine().step();
    assert_eq!(
        (a.account().owed_bytes(), pool.stats().committed_bytes),
        (0, 0)
    );
}
