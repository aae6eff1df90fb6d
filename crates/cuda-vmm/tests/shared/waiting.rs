//! Waiting for memory: which model is served, in which order, and what the error says.

use crate::common::{ModelOptions, Models, PAGE, Simulated, manual};
use crate::{CAPACITY, Fixture, LIMIT, pool};
use cuda_vmm::{EngineOptions, Stream, VirtualMemoryPool, VmmError, WorkerMode};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// Longer than any wait here is; a test that fails ends all the same.
const FOREVER: Duration = Duration::from_secs(60);

/// Returns when the model owes just so many pages, which others have been told then.
#[track_caller]
fn until_owed(model: &VirtualMemoryPool, pages: usize) {
    let deadline = Instant::now() + FOREVER;
    while model.account().owed_bytes() != pages * PAGE {
        let owed_bytes = model.account().owed_bytes();
        assert!(Instant::now() < deadline, "{owed_bytes} bytes are owed");
        thread::yield_now();
    }
}

fn register(pool: &Models, model: &str, priority: i32) -> Arc<VirtualMemoryPool> {
    let options = ModelOptions {
        priority,
        ..ModelOptions::new(CAPACITY)
    };
    pool.register_model_with(model, options).expect("addresses");
    pool.model(model).expect("registered")
}

/// With a worker and without.
fn engines() -> [EngineOptions; 2] {
    [WorkerMode::Thread, WorkerMode::Manual]
        .map(|worker| EngineOptions::new().limit_bytes(LIMIT).worker(worker))
}

#[test]
fn after_the_time_the_error_says_what_there_is_and_nothing_has_changed() {
    let fixture = Fixture::new();
    let pool = &fixture.pool;
    pool.allocate_for_model("a", 7 * PAGE).expect("room");
    for timeout in [Duration::ZERO, Duration::from_millis(3)] {
        let error = fixture.refused(|pool| pool.allocate_for_model_timeout("b", 3 * PAGE, timeout));
        assert_eq!(
            error,
            VmmError::OutOfPhysicalMemory {
                asked_bytes: 3 * PAGE,
                free_bytes: PAGE,
                retiring_bytes: 0,
                reclaimable_bytes: 0,
                limit_bytes: LIMIT
            }
        );
        assert_eq!(pool.model_owed_bytes("a"), Some(2 * PAGE));
    }
    pool.allocate_for_model("b", PAGE)
        .expect("no thread waits any more");
}

#[test]
fn what_needs_no_wait_or_can_never_be_had_is_answered_at_once() {
    let fixture = Fixture::new();
    let a = fixture.pool.model("a").expect("registered");
    let address = a.allocate_timeout(PAGE, PAGE, Duration::ZERO);
    assert_eq!(address, Ok(a.base_address() + PAGE as u64));
    let address = a.allocate_anywhere_timeout(1, 1, Duration::ZERO);
    assert_eq!(address, Ok(a.base_address()));
    let zero = |what| VmmError::ZeroSize { what };
    for (expected, error) in [
        (
            zero("alignment"),
            a.allocate_anywhere_timeout(1, 0, FOREVER),
        ),
        (zero("size"), a.allocate_timeout(0, 0, FOREVER)),
        (zero("size"), a.allocate_anywhere_timeout(0, 1, FOREVER)),
        (
            VmmError::AlreadyMapped {
                offset: PAGE,
                bytes: 1,
            },
            a.allocate_timeout(PAGE, 1, FOREVER),
        ),
        (
            VmmError::OutOfPhysicalMemory {
                asked_bytes: 9 * PAGE,
                free_bytes: 6 * PAGE,
                retiring_bytes: 0,
                reclaimable_bytes: 0,
                limit_bytes: LIMIT,
            },
            a.allocate_timeout(2 * PAGE, 9 * PAGE, FOREVER),
        ),
        (
            VmmError::ModelNotFound { model: "c".into() },
            (fixture.pool).allocate_for_model_timeout("c", 1, FOREVER),
        ),
    ] {
        assert_eq!(error, Err(expected));
    }
}

#[test]
fn a_wait_ends_with_what_another_was_asked_to_give_back() {
    for options in engines() {
        let simulated = Simulated::default();
        let pool = pool(&simulated.device, options.park_bytes_max(LIMIT));
        let [a, b] = ["a", "b"].map(|model| register(&pool, model, 0));
        a.allocate(0, 8 * PAGE).expect("room");
        thread::scope(|scope| {
            let waits = scope.spawn(|| b.allocate_timeout(0, 3 * PAGE, FOREVER));
            until_owed(&a, 3);
            a.deallocate(0, 2 * PAGE).expect("live");
            until_owed(&a, 1);
            a.deallocate(2 * PAGE, PAGE).expect("live");
            until_owed(&a, 0);
            assert_eq!(waits.join().expect("no panic"), Ok(b.base_address()));
        });
        assert_eq!(b.stats().live_pages, 3);
    }
}

#[test]
fn a_wait_ends_with_the_work_that_freed_memory_was_waiting_for() {
    for options in engines() {
        for named in [true, false] {
            let simulated = Simulated::default();
            let pool = pool(&simulated.device, options);
            let [a, b] = ["a", "b"].map(|model| register(&pool, model, 0));
            let stream = Stream::new(&simulated.device).expect("a stream");
            if named {
                a.use_stream(&stream).expect("of this device");
            }
            let address = a.allocate(0, LIMIT).expect("room");
            let held = simulated.hold_work();
            // SAFETY: the pool keeps the memory mapped until the stream is past this.
            unsafe { stream.memset(address, 1, LIMIT) }.expect("queued");
            a.deallocate(0, LIMIT).expect("live");
            assert_eq!(
                b.allocate_timeout(0, PAGE, Duration::from_millis(2)),
                Err(VmmError::OutOfPhysicalMemory {
                    asked_bytes: PAGE,
                    free_bytes: 0,
                    retiring_bytes: LIMIT,
                    reclaimable_bytes: 0,
                    limit_bytes: LIMIT
                })
            );
            assert_eq!(a.account().owed_bytes(), 0, "it has done its part");
            thread::scope(|scope| {
                let waits = scope.spawn(|| b.allocate_timeout(0, PAGE, FOREVER));
                drop(held);
                waits.join().expect("no panic").expect("it comes back");
            });
            assert!(!simulated.simulator.is_poisoned(0));
        }
    }
}

#[test]
fn a_wait_ends_with_the_lease_of_freed_memory() {
    for options in engines() {
        let simulated = Simulated::default();
        let pool = pool(&simulated.device, options);
        let [a, b] = ["a", "b"].map(|model| register(&pool, model, 0));
        a.allocate(0, LIMIT).expect("room");
        let token = Arc::new(());
        a.lease(0, PAGE, token.clone()).expect("live");
        a.deallocate(0, PAGE).expect("live");
        thread::scope(|scope| {
            let waits = scope.spawn(|| b.allocate_timeout(0, PAGE, FOREVER));
            // It waits, and no other thread looks at the token.
            until_owed(&a, 1);
            drop(token);
            waits.join().expect("no panic").expect("the lease is over");
        });
    }
}

#[test]
fn pages_that_retire_at_the_very_addresses_are_waited_for() {
    let simulated = Simulated::default();
    let pool = pool(&simulated.device, manual().limit_bytes(LIMIT));
    let a = register(&pool, "a", 0);
    let stream = Stream::new(&simulated.device).expect("a stream");
    let address = a.allocate(0, PAGE).expect("room");
    let held = simulated.hold_work();
    // SAFETY: the pool keeps the memory mapped until the stream is past this.
    unsafe { stream.memset(address, 1, PAGE) }.expect("queued");
    a.deallocate(0, PAGE).expect("live");
    let error = a.allocate_timeout(0, PAGE, Duration::from_millis(2));
    assert!(error.expect_err("it retires").is_retryable());
    drop(held);
    a.allocate_timeout(0, PAGE, FOREVER).expect("it is parked");
}

#[test]
fn the_highest_priority_is_served_first_and_then_the_first_to_come() {
    for options in engines() {
        let simulated = Simulated::default();
        let pool = pool(&simulated.device, options);
        let holds = register(&pool, "holds", -1);
        holds.allocate(0, 8 * PAGE).expect("room");
        let names = ["low", "first", "second", "urgent"];
        let priorities = [0, 3, 3, 4];
        let (served, order) = mpsc::channel();
        thread::scope(|scope| {
            for (number, (name, priority)) in names.into_iter().zip(priorities).enumerate() {
                let (model, served) = (register(&pool, name, priority), served.clone());
                scope.spawn(move || {
                    let outcome = model.allocate_timeout(0, PAGE, FOREVER);
                    served.send((name, outcome.is_ok())).expect("received");
                });
                // It stands in the line before the next one comes.
                until_owed(&holds, number + 1);
            }
            for (page, name) in ["urgent", "first", "second", "low"].into_iter().enumerate() {
                holds.deallocate(page * PAGE, PAGE).expect("live");
                assert_eq!(order.recv(), Ok((name, true)));
            }
        });
        until_owed(&holds, 0);
    }
}

#[test]
fn a_later_model_does_not_take_what_others_wait_for_but_a_guarantee_does() {
    let simulated = Simulated::default();
    let pool = pool(&simulated.device, manual().limit_bytes(LIMIT));
    let [holds, waits, late] = ["holds", "waits", "late"].map(|model| register(&pool, model, 0));
    let sure = ModelOptions {
        guarantee_bytes: PAGE,
        priority: -7,
        ..ModelOptions::new(CAPACITY)
    };
    pool.register_model_with("sure", sure).expect("it can hold");
    let urgent = register(&pool, "urgent", 1);
    holds.allocate(0, 7 * PAGE).expect("room");
    thread::scope(|scope| {
        let waiting = scope.spawn(|| waits.allocate_timeout(0, 5 * PAGE, FOREVER));
        until_owed(&holds, 5);
        holds.deallocate(0, 4 * PAGE).expect("live");
        for error in [
            late.try_allocate(0, PAGE),
            late.allocate(0, PAGE),
            late.allocate_timeout(0, PAGE, Duration::ZERO),
            holds.try_allocate(0, PAGE),
        ] {
            let error = error.expect_err("it is for another");
            assert_eq!(error.shortfall_bytes(), PAGE, "{error}");
        }
        pool.allocate_for_model("sure", PAGE).expect("guaranteed");
        urgent.try_allocate(0, PAGE).expect("before all others");
        // Two for the one that waits, and one for the one that was refused.
        until_owed(&holds, 3);
        holds.deallocate(4 * PAGE, 2 * PAGE).expect("live");
        waiting.join().expect("no panic").expect("its turn");
    });
    assert_eq!(late.account().owed_bytes(), 0);
}

#[test]
fn a_thread_that_gives_up_lets_those_behind_it_go_on() {
    let simulated = Simulated::default();
    let pool = pool(&simulated.device, manual().limit_bytes(LIMIT));
    let [holds, first, second] =
        ["holds", "first", "second"].map(|model| register(&pool, model, 0));
    holds.allocate(0, 6 * PAGE).expect("room");
    thread::scope(|scope| {
        // The one that stands ahead wants more than there is, and leaves with its model.
        let ahead = scope.spawn(|| first.allocate_timeout(0, 4 * PAGE, FOREVER));
        until_owed(&holds, 2);
        let behind = scope.spawn(|| second.allocate_timeout(0, PAGE, FOREVER));
        until_owed(&holds, 3);
        pool.unregister_model("first").expect("registered");
        assert_eq!(ahead.join().expect("no panic"), Err(VmmError::Closed));
        behind.join().expect("no panic").expect("there was room");
    });
}

#[test]
fn at_its_own_ceiling_a_model_waits_for_what_it_frees_itself() {
    for options in engines() {
        let simulated = Simulated::default();
        let pool = pool(&simulated.device, options);
        let a = register(&pool, "a", 0);
        let quota = pool.quota("a").expect("registered");
        pool.set_quota("a", quota.ceiling_bytes(2 * PAGE))
            .expect("it can hold");
        a.allocate(0, 2 * PAGE).expect("room");
        let error = a.allocate_timeout(4 * PAGE, PAGE, Duration::ZERO);
        assert!(error.expect_err("at its ceiling").is_retryable());
        thread::scope(|scope| {
            let waits = scope.spawn(|| a.allocate_timeout(4 * PAGE, PAGE, FOREVER));
            a.deallocate(0, PAGE).expect("live");
            waits.join().expect("no panic").expect("its own memory");
        });
        let b = register(&pool, "b", 0);
        b.allocate(0, 6 * PAGE).expect("no model stands in the way");
    }
}

#[test]
fn a_raised_ceiling_or_priority_serves_a_waiting_model() {
    let simulated = Simulated::default();
    let pool = pool(&simulated.device, manual().limit_bytes(LIMIT));
    let [holds, a, b] = ["holds", "a", "b"].map(|model| register(&pool, model, 0));
    holds.allocate(0, 8 * PAGE).expect("room");
    thread::scope(|scope| {
        let first = scope.spawn(|| a.allocate_timeout(0, 2 * PAGE, FOREVER));
        until_owed(&holds, 2);
        let second = scope.spawn(|| b.allocate_timeout(0, PAGE, FOREVER));
        until_owed(&holds, 3);
        let quota = pool.quota("b").expect("registered");
        pool.set_quota("b", quota.priority(1)).expect("it can hold");
        holds.deallocate(0, PAGE).expect("live");
        second.join().expect("no panic").expect("its turn");
        holds.deallocate(PAGE, 2 * PAGE).expect("live");
        first.join().expect("no panic").expect("its turn");
        let quota = pool.quota("a").expect("registered");
        pool.set_quota("a", quota.ceiling_bytes(2 * PAGE))
            .expect("just what it holds");
        holds.deallocate(3 * PAGE, PAGE).expect("live");
        let waits = scope.spawn(|| a.allocate_timeout(2 * PAGE, PAGE, FOREVER));
        pool.set_quota("a", quota).expect("upwards");
        waits
            .join()
            .expect("no panic")
            .expect("no ceiling any more");
    });
}

/// A part of what a model waits for was there when it began to wait, and goes to another.
#[test]
fn a_model_that_needs_more_while_it_waits_is_owed_more() {
    let simulated = Simulated::default();
    let pool = pool(&simulated.device, manual().limit_bytes(LIMIT));
    let [holds, waits] = ["holds", "waits"].map(|model| register(&pool, model, 0));
    let urgent = register(&pool, "urgent", 1);
    holds.allocate(0, 7 * PAGE).expect("room");
    waits.allocate(0, 1).expect("room");
    thread::scope(|scope| {
        let waiting = scope.spawn(|| waits.allocate_timeout(1, 3 * PAGE - 1, FOREVER));
        until_owed(&holds, 2);
        waits.deallocate(0, 1).expect("live");
        while urgent.try_allocate(0, PAGE).is_err() {
            thread::yield_now();
        }
        until_owed(&holds, 3);
        holds.deallocate(0, 3 * PAGE).expect("live");
        waiting.join().expect("no panic").expect("its turn");
    });
}
