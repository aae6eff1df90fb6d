//! No worker thread: calls that wait do its work.

use crate::common::told::Keeper;
use crate::common::{Models, PAGE, Simulated, alone, manual, role, run_alone};
use crate::{CAPACITY, pool};
use cuda_vmm::sim::{Fault, SimConfig};
use cuda_vmm::sys::{CUDA_ERROR_OPERATING_SYSTEM, DriverFunction};
use cuda_vmm::{Device, EngineOptions};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Longer than any wait here is; a test that fails ends all the same.
const FOREVER: Duration = Duration::from_secs(60);
/// A driver without `cuCtxRecordEvent`: only a context synchronise tells what is past.
const OLD: i32 = 12_040;

/// A model that holds all eight pages, and one that wants some.
fn full(device: &Device, options: EngineOptions) -> Models {
    let pool = pool(device, options.limit_bytes(8 * PAGE));
    for model in ["holds", "wants"] {
        pool.register_model(model, CAPACITY).expect("a new name");
    }
    pool.allocate_for_model_at("holds", 0, 8 * PAGE)
        .expect("room");
    pool
}

#[test]
fn a_thread_that_waits_tries_again_what_the_driver_refused() {
    for version in [OLD, 13_000] {
        let simulated = Simulated::new(SimConfig::new().driver_version(version));
        let pool = full(&simulated.device, manual());
        for _ in 0..3 {
            let refused = Fault::nth_of(DriverFunction::cuMemUnmap, 1, CUDA_ERROR_OPERATING_SYSTEM);
            simulated.simulator.inject(refused);
        }
        pool.deallocate_for_model("holds", 0, 4 * PAGE)
            .expect("live");
        pool.engine().step();
        assert!(pool.stats().parts.quarantined_bytes > 0);
        pool.allocate_for_model_timeout("wants", 4 * PAGE, FOREVER)
            .expect("it is taken back at last");
    }
}

#[test]
fn a_thread_that_waits_finds_that_leases_are_over() {
    for version in [OLD, 13_000] {
        let simulated = Simulated::new(SimConfig::new().driver_version(version));
        let pool = full(&simulated.device, manual());
        let holds = pool.model("holds").expect("registered");
        let token = Arc::new(());
        holds.lease(0, 4 * PAGE, token.clone()).expect("live");
        holds.deallocate(0, 8 * PAGE).expect("live");
        let waits = {
            let pool = pool.clone();
            std::thread::spawn(move || pool.allocate_for_model_timeout("wants", 8 * PAGE, FOREVER))
        };
        while pool.engine().counters().waits == 0 {
            std::thread::yield_now();
        }
        drop(token);
        waits.join().expect("no panic").expect("the lease is over");
    }
}

/// Frees memory when it is told that no thread could start.
struct Frees(Mutex<Option<Models>>);

impl Subscriber for Frees {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {
        let pool = self.0.lock().expect("no panic").take();
        if let Some(pool) = pool {
            pool.deallocate_for_model("holds", PAGE, PAGE)
                .expect("live");
        }
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// Limits this process's addresses to what it has and a little more: then no thread can start.
fn limit_addresses(is_limited: bool) {
    let used = || {
        let text = std::fs::read_to_string("/proc/self/statm").expect("on Linux");
        let pages = text.split(' ').next().and_then(|pages| pages.parse().ok());
        pages.map_or(0, |pages: u64| pages * 4096)
    };
    let limit = libc::rlimit {
        rlim_cur: match is_limited {
            true => used() + (512 << 10),
            false => libc::RLIM_INFINITY,
        },
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: the structure is on the stack.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &limit) }, 0);
}

/// In a process of its own, as it is the process that has no more room for a thread.
#[test]
fn calls_do_the_work_if_no_thread_can_start() {
    const TEST: &str = "no_worker::calls_do_the_work_if_no_thread_can_start";
    if role().is_none() {
        run_alone(&mut alone(TEST, "limited"));
        return;
    }
    let simulated = Simulated::new(SimConfig::new().unbacked().driver_version(OLD));
    let pool = full(&simulated.device, EngineOptions::new());
    let frees = Frees(Mutex::new(Some(pool.clone())));
    tracing::subscriber::set_global_default(frees).expect("the first");
    limit_addresses(true);
    let refused = std::thread::Builder::new().spawn(|| ());
    let freed = pool.deallocate_for_model("holds", 0, PAGE);
    let waited = pool.allocate_for_model_timeout("wants", 2 * PAGE, FOREVER);
    let retired = pool.deallocate_for_model("wants", 0, 2 * PAGE);
    let taken = pool.allocate_for_model("wants", 2 * PAGE);
    limit_addresses(false);
    refused.expect_err("no room for a thread");
    freed.expect("live");
    waited.expect("the call synchronises the context");
    retired.expect("live");
    taken.expect("the call synchronises the context");
}

/// In a process of its own too. Each free asks for the thread.
#[test]
fn a_thread_that_was_refused_is_asked_for_again_some_calls_later() {
    const TEST: &str = "no_worker::a_thread_that_was_refused_is_asked_for_again_some_calls_later";
    if role().is_none() {
        run_alone(&mut alone(TEST, "limited"));
        return;
    }
    let simulated = Simulated::new(SimConfig::new().unbacked());
    let pool = full(&simulated.device, EngineOptions::new());
    let keeper = Keeper::default();
    let told = keeper.told.clone();
    tracing::subscriber::set_global_default(keeper).expect("the first");
    let is_told = |text| {
        let told = told.0.lock().expect("no panic");
        told.iter().any(|(_, told)| told.contains(text))
    };
    let free = |page| pool.deallocate_for_model("holds", page * PAGE, PAGE);
    limit_addresses(true);
    let freed = free(0);
    limit_addresses(false);
    freed.expect("live");
    assert!(is_told("the worker thread could not start"));
    let starts = |page: &usize| {
        free(*page).expect("live");
        is_told("the worker thread starts")
    };
    // Two calls pass before the system is asked again.
    assert_eq!((1..8).find(starts), Some(3));
}
