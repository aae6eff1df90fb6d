//! What the pools tell `tracing`, to a subscriber of the test's own.

use super::{CAPACITY, pool};
use crate::common::told::{Keeper, Told, told};
use crate::common::{ModelOptions, PAGE, Simulated, manual};
use cuda_vmm::sim::Fault;
use cuda_vmm::sys::{CUDA_ERROR_OUT_OF_MEMORY, CUDA_ERROR_UNKNOWN, DriverFunction};
use cuda_vmm::{Engine, EngineOptions, PoolOptions, Quota, VirtualMemoryPool};
use tracing::Level;

#[track_caller]
fn has(told: &[(Level, String)], level: Level, parts: &[&str]) {
    let is_it =
        |(of, text): &(Level, String)| *of == level && parts.iter().all(|part| text.contains(part));
    assert!(told.iter().any(is_it), "no {parts:?} in {told:#?}");
}

#[test]
fn a_refusal_is_told_with_what_was_asked_for() {
    let simulated = Simulated::default();
    let pool = pool(&simulated.device, manual().limit_bytes(2 * PAGE));
    pool.register_model("a", CAPACITY).expect("a new name");
    let told = told(|| {
        pool.allocate_for_model_at("a", PAGE, 3 * PAGE)
            .expect_err("more than the limit");
    });
    let bytes = format!("bytes={}", 3 * PAGE);
    let at = format!("At({PAGE})");
    has(
        &told,
        Level::DEBUG,
        &["memory was refused;", &at, &bytes, "is_retryable=false"],
    );
}

#[test]
fn what_calls_no_driver_tells_nothing() {
    let simulated = Simulated::default();
    let pool = pool(&simulated.device, manual().park_bytes_max(4 * PAGE));
    pool.register_model("a", CAPACITY).expect("a new name");
    pool.allocate_for_model_at("a", 0, PAGE).expect("room");
    let told = told(|| {
        pool.deallocate_for_model("a", 0, PAGE / 2).expect("live");
        pool.allocate_for_model_at("a", 0, PAGE / 2).expect("there");
        pool.allocate_for_model_at("a", 0, 1).expect_err("live");
    });
    assert_eq!(told, []);
}

#[test]
fn what_the_driver_would_not_do_is_told() {
    let simulated = Simulated::default();
    let pool = pool(&simulated.device, manual());
    let mut options = ModelOptions::new(CAPACITY);
    options.ahead_bytes_max = PAGE;
    pool.register_model_with("a", options).expect("a new name");
    let nth = |function, code| simulated.simulator.inject(Fault::nth_of(function, 1, code));

    nth(DriverFunction::cuMemCreate, CUDA_ERROR_OUT_OF_MEMORY);
    let short = told(|| {
        pool.allocate_for_model_at("a", 0, PAGE).expect("room");
    });
    has(&short, Level::DEBUG, &["span fill;", "offset=0"]);
    has(&short, Level::DEBUG, &["made ahead is not there yet"]);
    has(
        &short,
        Level::WARN,
        &["the device has no memory", "OUT_OF_MEMORY"],
    );

    nth(DriverFunction::cuMemCreate, CUDA_ERROR_UNKNOWN);
    let ahead = told(|| {
        pool.engine().step();
    });
    has(
        &ahead,
        Level::DEBUG,
        &["could not be made ahead", "cuMemCreate"],
    );

    pool.deallocate_for_model("a", 0, PAGE).expect("live");
    simulated.device.synchronize().expect("done");
    nth(DriverFunction::cuMemUnmap, CUDA_ERROR_UNKNOWN);
    let kept = told(|| drop(pool.trim().expect_err("refused")));
    has(&kept, Level::WARN, &["quarantined", "cuMemUnmap"]);
    let again = told(|| pool.trim().map(drop).expect("not again"));
    has(&again, Level::DEBUG, &["asked again", "pieces=1"]);
}

/// What is told from now on, also by the worker: as that is another thread, the subscriber is the
/// process's. So the test runs in a process of its own, and `None` says that it has done so.
fn told_alone(test: &str) -> Option<Told> {
    if crate::common::role().is_none() {
        crate::common::run_alone(&mut crate::common::alone(test, "told"));
        return None;
    }
    let keeper = Keeper::default();
    let told = keeper.told.clone();
    tracing::subscriber::set_global_default(keeper).expect("the first");
    Some(told)
}

#[test]
fn the_worker_tells_when_it_starts_and_ends() {
    let Some(told) = told_alone("events::the_worker_tells_when_it_starts_and_ends") else {
        return;
    };
    let simulated = Simulated::default();
    let engine = Engine::new(&simulated.device, EngineOptions::new()).expect("an engine");
    let pool = VirtualMemoryPool::on_engine(&engine, CAPACITY, PAGE).expect("a range");
    pool.allocate(0, PAGE).expect("room");
    pool.deallocate(0, PAGE).expect("live");
    while engine.stats().committed_bytes > 0 {
        std::thread::yield_now();
    }
    drop((pool, engine));
    let is_over = || {
        let told = told.0.lock().expect("no panic");
        told.iter()
            .any(|(_, text)| text.contains("the worker thread ends"))
    };
    // The engine may end on the worker itself, a moment later.
    let started = std::time::Instant::now();
    while !is_over() {
        assert!(started.elapsed() < crate::common::PATIENCE, "{told:?}");
        std::thread::yield_now();
    }
    let told = told.0.lock().expect("no panic");
    has(&told, Level::DEBUG, &["the worker thread starts"]);
    has(&told, Level::TRACE, &["took a step", "is_worker=true"]);
}

#[test]
fn the_worker_rests_when_an_account_is_closed_for_which_memory_is_made_ahead() {
    let Some(told) = told_alone(
        "events::the_worker_rests_when_an_account_is_closed_for_which_memory_is_made_ahead",
    ) else {
        return;
    };
    let simulated = Simulated::default();
    let engine = Engine::new(&simulated.device, EngineOptions::new()).expect("an engine");
    let account = engine.account("a", Quota::new()).expect("a new name");
    let ahead = PoolOptions::new().ahead_bytes_max(2 * PAGE);
    let pool = VirtualMemoryPool::on_account(&account, CAPACITY, PAGE, ahead).expect("a range");
    account.close();
    let steps = || {
        let told = told.0.lock().expect("no panic");
        let steps = told.iter().filter(|(_, text)| text.contains("took a step"));
        steps.count()
    };
    let started = std::time::Instant::now();
    loop {
        let before = steps();
        std::thread::sleep(std::time::Duration::from_millis(100));
        if steps() == before {
            break;
        }
        assert!(started.elapsed() < crate::common::PATIENCE, "no rest");
    }
    drop(pool);
}
