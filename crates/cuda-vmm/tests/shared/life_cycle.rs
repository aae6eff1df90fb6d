//! Models that go, and pools, while others wait, owe, use or lease.

use crate::common::{Models, PAGE, Simulated, manual};
use crate::{CAPACITY, LIMIT, pool};
use cuda_vmm::{EngineOptions, Stream, VmmError, WorkerMode};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// Longer than any wait here is; a test that fails ends all the same.
const FOREVER: Duration = Duration::from_secs(60);

fn two_models(simulated: &Simulated, worker: WorkerMode) -> Models {
    let options = EngineOptions::new().limit_bytes(LIMIT).worker(worker);
    let pool = pool(&simulated.device, options);
    for model in ["a", "b"] {
        pool.register_model(model, CAPACITY).expect("addresses");
    }
    pool
}

/// Returns when something waits for memory of the model.
fn until_it_owes(pool: &Models, model: &str) {
    while pool.model_owed_bytes(model).expect("registered") == 0 {
        thread::yield_now();
    }
}

#[test]
fn a_model_that_is_unregistered_with_memory_in_use_serves_a_waiting_model() {
    for worker in [WorkerMode::Thread, WorkerMode::Manual] {
        let simulated = Simulated::default();
        let pool = two_models(&simulated, worker);
        let [a, b] = ["a", "b"].map(|model| pool.model(model).expect("registered"));
        let stream = Stream::new(&simulated.device).expect("a stream");
        a.use_stream(&stream).expect("of this device");
        let address = a.allocate(0, LIMIT).expect("room");
        let token = Arc::new(());
        a.lease(0, 2 * PAGE, token.clone()).expect("live");
        // SAFETY: the pool keeps the memory mapped until the stream is past this.
        unsafe { stream.memset(address, 1, LIMIT) }.expect("queued");
        thread::scope(|scope| {
            let waits = scope.spawn(|| b.allocate_timeout(0, 6 * PAGE, FOREVER));
            until_it_owes(&pool, "a");
            drop(a);
            pool.unregister_model("a").expect("registered");
            waits
                .join()
                .expect("no panic")
                .expect("all but what is leased");
            assert_eq!(pool.stats().parts.leased_bytes, 2 * PAGE);
            let waits = scope.spawn(|| b.allocate_timeout(6 * PAGE, 2 * PAGE, FOREVER));
            drop(token);
            if worker == WorkerMode::Manual {
                // Leases are looked at by steps, and by calls that need memory.
                while !waits.is_finished() {
                    pool.engine().step();
                }
            }
            waits.join().expect("no panic").expect("the lease is over");
        });
        assert!(!simulated.simulator.is_poisoned(0));
        assert_eq!(pool.models(), ["b"]);
    }
}

#[test]
fn a_thread_that_waits_on_a_model_that_is_unregistered_is_told_that_it_is_closed() {
    for worker in [WorkerMode::Thread, WorkerMode::Manual] {
        let simulated = Simulated::default();
        let pool = two_models(&simulated, worker);
        pool.allocate_for_model("a", LIMIT).expect("room");
        thread::scope(|scope| {
            let waits = [(); 3]
                .map(|()| scope.spawn(|| pool.allocate_for_model_timeout("b", PAGE, FOREVER)));
            while pool.model_owed_bytes("a") != Some(3 * PAGE) {
                thread::yield_now();
            }
            pool.unregister_model("b").expect("registered");
            for waits in waits {
                assert_eq!(waits.join().expect("no panic"), Err(VmmError::Closed));
            }
        });
        assert_eq!(pool.model_owed_bytes("a"), Some(0));
        pool.register_model("b", CAPACITY).expect("a new name");
        pool.deallocate_for_model("a", 0, PAGE).expect("live");
        pool.allocate_for_model("b", PAGE).expect("room");
    }
}

#[test]
fn dropping_the_last_clone_serves_a_thread_that_waits_through_a_handle() {
    for worker in [WorkerMode::Thread, WorkerMode::Manual] {
        let simulated = Simulated::default();
        let books = simulated.books();
        let pool = two_models(&simulated, worker);
        pool.allocate_for_model("a", LIMIT).expect("room");
        let b = pool.model("b").expect("registered");
        let handle = b.clone();
        let waits = thread::spawn(move || handle.allocate_timeout(0, LIMIT, FOREVER));
        until_it_owes(&pool, "a");
        drop(pool.clone());
        assert_eq!(b.stats().live_bytes, 0);
        drop(pool);
        waits.join().expect("no panic").expect("the other is gone");
        assert_eq!(b.stats().live_bytes, LIMIT);
        assert_eq!(simulated.books().physical_bytes, LIMIT);
        let engine = b.engine().clone();
        drop(b);
        assert_eq!(engine.stats().committed_bytes, 0);
        drop(engine);
        assert_eq!(simulated.books().physical_bytes, books.physical_bytes);
        assert_eq!(simulated.books().reservations, books.reservations);
    }
}

#[test]
fn a_model_that_owes_may_go_and_its_memory_serves_the_model_that_was_refused() {
    let simulated = Simulated::default();
    let pool = pool(&simulated.device, manual().limit_bytes(LIMIT));
    for model in ["a", "b", "c"] {
        pool.register_model(model, CAPACITY).expect("addresses");
    }
    pool.allocate_for_model("a", 5 * PAGE).expect("room");
    pool.allocate_for_model("b", 3 * PAGE).expect("room");
    pool.allocate_for_model("c", 4 * PAGE)
        .expect_err("nothing is free");
    let owed = |model| pool.model_owed_bytes(model).map(|bytes| bytes / PAGE);
    assert_eq!((owed("a"), owed("b")), (Some(4), Some(0)));
    pool.unregister_model("a").expect("registered");
    assert_eq!((owed("a"), owed("b")), (None, Some(0)));
    pool.allocate_for_model("c", 4 * PAGE).expect("it is free");
}
