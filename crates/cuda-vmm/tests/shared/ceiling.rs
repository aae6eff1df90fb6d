//! A ceiling that is lowered while its model is busy, and what can never be had.

use crate::common::{ModelOptions, Models, PAGE, Simulated, manual};
use crate::{CAPACITY, LIMIT, pool};
use cuda_vmm::{EngineOptions, Quota, Stream, VirtualMemoryPool, VmmError};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Longer than any wait here is; a test that fails ends all the same.
const FOREVER: Duration = Duration::from_secs(60);

/// How a model holds what it has freed.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Freed {
    /// It retires until a thread looks.
    Retiring,
    /// It retires behind the one stream that is named, and could be taken back at once.
    OnAStream,
    Parked,
    /// It was made ahead, and never used.
    Ahead,
}

/// A model that holds six live pages and two that it could take at once, at page 6; nothing steps
/// by itself.
struct Busy {
    _simulated: Simulated,
    pool: Models,
    model: Arc<VirtualMemoryPool>,
    _stream: Option<Stream>,
}

impl Busy {
    fn new(freed: Freed) -> Self {
        let simulated = Simulated::default();
        let options = manual().limit_bytes(LIMIT).chunk_bytes_max(0);
        let pool = pool(&simulated.device, options.park_bytes_max(LIMIT));
        let ahead_bytes_max = if freed == Freed::Ahead { 2 * PAGE } else { 0 };
        let options = ModelOptions {
            ahead_bytes_max,
            ..ModelOptions::new(CAPACITY)
        };
        pool.register_model_with("a", options).expect("addresses");
        let model = pool.model("a").expect("registered");
        let stream = (freed == Freed::OnAStream).then(|| {
            let stream = Stream::new(&simulated.device).expect("a stream");
            model.use_stream(&stream).expect("of this device");
            stream
        });
        model.allocate(0, 6 * PAGE).expect("room");
        if freed == Freed::Ahead {
            pool.engine().step();
            assert_eq!(pool.stats().parts.ahead_bytes, 2 * PAGE);
        } else {
            model.allocate(6 * PAGE, 2 * PAGE).expect("room");
            model.deallocate(6 * PAGE, 2 * PAGE).expect("live");
        }
        if freed == Freed::Parked {
            simulated.device.synchronize().expect("done");
            pool.engine().step();
            assert_eq!(pool.stats().parts.parked_bytes, 2 * PAGE);
        }
        Self {
            _simulated: simulated,
            pool,
            model,
            _stream: stream,
        }
    }

    fn ceiling(&self, pages: usize) {
        let quota = Quota::new().ceiling_bytes(pages * PAGE);
        self.pool.set_quota("a", quota).expect("no guarantee");
    }
}

const ALL: [Freed; 4] = [
    Freed::Retiring,
    Freed::OnAStream,
    Freed::Parked,
    Freed::Ahead,
];

#[test]
fn above_a_lowered_ceiling_nothing_that_was_freed_is_used_again() {
    for freed in ALL {
        let Busy { pool, model, .. } = &{
            let busy = Busy::new(freed);
            busy.ceiling(3);
            busy
        };
        assert_eq!(model.account().owed_bytes(), 3 * PAGE, "{freed:?}");
        for patience in 0..3 {
            let error = match patience {
                0 => model.allocate(6 * PAGE, PAGE),
                1 => model.try_allocate(6 * PAGE, PAGE),
                _ => model.allocate_timeout(6 * PAGE, PAGE, Duration::from_millis(2)),
            };
            let error = error.expect_err("above its ceiling");
            let VmmError::OutOfPhysicalMemory {
                asked_bytes,
                free_bytes,
                limit_bytes,
                ..
            } = error
            else {
                panic!("{freed:?}: {error}");
            };
            assert_eq!((asked_bytes, free_bytes), (PAGE, 0), "{freed:?}");
            assert_eq!(limit_bytes, 3 * PAGE, "{freed:?}");
            assert!(error.is_retryable(), "{error}");
        }
        // Bytes of a page that it has cost nothing.
        model.deallocate(0, 10).expect("live");
        model.allocate(0, 10).expect("of a live page");
        // A step's worth of sequences ends, and as many begin.
        for page in 0..6 {
            model.deallocate(page * PAGE, PAGE).expect("live");
            if page < 3 {
                let error = model.allocate(page * PAGE, PAGE);
                assert!(error.is_err(), "{freed:?}: page {page} came back");
            }
        }
        assert_eq!(model.account().owed_bytes(), 0);
        model.allocate(0, 3 * PAGE).expect("up to its ceiling");
        let error = model.allocate(3 * PAGE, PAGE).expect_err("no more");
        assert!(error.is_retryable(), "{error}");
        pool.engine().step();
        assert_eq!(pool.stats().committed_bytes, 3 * PAGE, "{freed:?}");
    }
}

#[test]
fn below_a_lowered_ceiling_what_was_freed_is_used_again() {
    for freed in ALL {
        let busy = Busy::new(freed);
        busy.ceiling(7);
        let made = || busy.pool.snapshot().counters.device_calls;
        let before = made();
        busy.model.allocate(6 * PAGE, PAGE).expect("seven at most");
        assert_eq!(made(), before, "{freed:?}: it was there");
        let error = busy.model.allocate(7 * PAGE, PAGE).expect_err("no more");
        assert!(error.is_retryable(), "{error}");
        busy.ceiling(8);
        busy.model.allocate(7 * PAGE, PAGE).expect("it is raised");
    }
}

#[test]
fn a_wait_above_a_ceiling_ends_with_what_the_model_frees() {
    for freed in ALL {
        let busy = Busy::new(freed);
        let model = &busy.model;
        busy.ceiling(6);
        thread::scope(|scope| {
            let waits = scope.spawn(|| model.allocate_timeout(6 * PAGE, PAGE, FOREVER));
            let began = Instant::now();
            while model.counters().allocations < 2 && busy.pool.snapshot().counters.waits == 0 {
                assert!(began.elapsed() < FOREVER && !waits.is_finished());
                thread::yield_now();
            }
            model.deallocate(0, PAGE).expect("live");
            waits.join().expect("no panic").expect("below its ceiling");
        });
        assert_eq!(model.physical_memory_usage(), 6 * PAGE, "{freed:?}");
    }
}

#[test]
fn a_worker_that_steps_meanwhile_changes_nothing_about_it() {
    let simulated = Simulated::default();
    let options = EngineOptions::new()
        .limit_bytes(64 * PAGE)
        .chunk_bytes_max(0);
    let pool = pool(&simulated.device, options.park_bytes_max(64 * PAGE));
    pool.register_model("a", 64 * PAGE).expect("addresses");
    let model = pool.model("a").expect("registered");
    model.allocate(0, 32 * PAGE).expect("room");
    let quota = Quota::new().ceiling_bytes(8 * PAGE);
    pool.set_quota("a", quota).expect("no guarantee");
    for page in 0..24 {
        model.deallocate(page * PAGE, PAGE).expect("live");
        if page < 23 {
            model.allocate(page * PAGE, PAGE).expect_err("above it");
        }
        if page % 5 == 0 {
            thread::sleep(Duration::from_millis(2));
        }
    }
    assert_eq!(model.physical_memory_usage(), 8 * PAGE);
    model.deallocate(31 * PAGE, PAGE).expect("live");
    model.allocate(0, PAGE).expect("at its ceiling");
}

#[test]
fn what_can_never_fit_the_limit_or_the_own_ceiling_is_never_later() {
    let simulated = Simulated::default();
    let pool = pool(&simulated.device, manual().limit_bytes(LIMIT));
    let ceiling = ModelOptions {
        ceiling_bytes: Some(4 * PAGE),
        ..ModelOptions::new(CAPACITY)
    };
    pool.register_model_with("small", ceiling)
        .expect("addresses");
    pool.register_model("a", CAPACITY).expect("addresses");
    for (name, most) in [("small", 4), ("a", 8)] {
        let model = pool.model(name).expect("registered");
        // A page that is there already does not make it possible.
        model.allocate(0, PAGE).expect("room");
        model.deallocate(0, PAGE).expect("live");
        pool.engine().step();
        for (offset, pages) in [(0, most + 1), (most, most + 1), (0, CAPACITY / PAGE)] {
            for timeout in [Duration::ZERO, FOREVER] {
                let error = model.allocate_timeout(offset * PAGE, pages * PAGE - 1, timeout);
                let is_too_long = offset + pages > CAPACITY / PAGE;
                let error = error.expect_err("too much");
                assert!(
                    error.is_permanent() && !error.is_retryable(),
                    "{name}: {error}"
                );
                assert_eq!(error.is_out_of_memory(), !is_too_long);
            }
        }
        // The first page lies at the edge of another allocation, and counts as well.
        model.allocate(0, PAGE / 2).expect("room");
        let error = model.allocate(PAGE / 2, most * PAGE).expect_err("too much");
        assert!(error.is_permanent(), "{name}: {error}");
        model.deallocate(0, PAGE / 2).expect("live");
        model.allocate(0, most * PAGE).expect("as much as may be");
        model.deallocate(0, most * PAGE).expect("live");
        pool.trim().expect("given back");
    }
}

#[test]
fn what_another_is_guaranteed_may_come_free() {
    let simulated = Simulated::default();
    let pool = pool(&simulated.device, manual().limit_bytes(LIMIT));
    pool.register_model("a", CAPACITY).expect("addresses");
    pool.register_model("b", CAPACITY).expect("addresses");
    let guarantee = ModelOptions {
        guarantee_bytes: 6 * PAGE,
        ..ModelOptions::new(CAPACITY)
    };
    pool.register_model_with("x", guarantee)
        .expect("it can hold");
    let a = pool.model("a").expect("registered");
    for error in [
        a.allocate(0, 4 * PAGE),
        a.try_allocate(0, 4 * PAGE),
        a.allocate_timeout(0, 4 * PAGE, Duration::from_millis(2)),
    ] {
        let error = error.expect_err("six are guaranteed");
        assert!(error.is_retryable() && !error.is_permanent(), "{error}");
        assert_eq!(error.shortfall_bytes(), 2 * PAGE);
    }
    thread::scope(|scope| {
        let waits = scope.spawn(|| a.allocate_timeout(0, 4 * PAGE, FOREVER));
        let began = Instant::now();
        while pool.snapshot().counters.waits < 2 && !waits.is_finished() {
            assert!(began.elapsed() < FOREVER, "it waits");
            thread::yield_now();
        }
        // No account owes it anything, and none stands behind it.
        pool.allocate_for_model("b", 2 * PAGE)
            .expect("there is room");
        assert_eq!(pool.model_owed_bytes("b"), Some(0));
        pool.unregister_model("x").expect("registered");
        waits
            .join()
            .expect("no panic")
            .expect("the guarantee is gone");
    });
}
