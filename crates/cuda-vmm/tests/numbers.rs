//! Numbers for operators: they add up at every moment, and count what they say.

mod common;

#[path = "numbers/events.rs"]
mod events;
#[path = "numbers/prometheus.rs"]
mod text;

use common::{ModelOptions, Models, PAGE, Simulated, manual};
use cuda_vmm::sim::{Fault, SimConfig};
use cuda_vmm::sys::{CUDA_ERROR_OUT_OF_MEMORY, CUDA_ERROR_UNKNOWN, DriverFunction};
use cuda_vmm::{
    Device, Engine, EngineOptions, MemoryParts, Quota, SharedPoolOptions, Snapshot, Stream,
    VirtualMemoryPool, VmmError,
};
use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::sync::atomic::{AtomicBool, Ordering};

const CAPACITY: usize = 64 * PAGE;
/// A name that every format has to take care of.
const NAME: &str = "a \"b\"\\c\nd";

fn pool(device: &Device, options: EngineOptions) -> Models {
    let options = SharedPoolOptions::new().engine(options.chunk_bytes_max(0));
    Models::with_options(device, options).expect("a pool")
}

/// The parts of models and others, one by one, are the engine's; and each sum is what is charged.
#[track_caller]
fn adds_up(snapshot: &Snapshot) {
    let engine = &snapshot.engine;
    assert_eq!(
        engine.parts.total_bytes(),
        engine.committed_bytes,
        "{snapshot:?}"
    );
    assert!(engine.committed_bytes <= engine.limit_bytes);
    let mut sum = snapshot.others;
    for model in &snapshot.accounts {
        let parts = model.stats.parts;
        let committed_bytes = model.stats.committed_bytes;
        assert_eq!(parts.total_bytes(), committed_bytes, "{snapshot:?}");
        assert!(model.stats.live_bytes <= parts.live_page_bytes);
        sum += parts;
    }
    assert_eq!(sum, engine.parts, "{snapshot:?}");
}

/// What is no model's, where the cache is all that can be: nothing but that, and what is on its way
/// out of it.
#[track_caller]
fn only_the_cache_has_no_account(snapshot: &Snapshot) {
    let mut cache = MemoryParts::default();
    cache.cached_bytes = snapshot.engine.parts.cached_bytes;
    cache.retiring_bytes = snapshot.others.retiring_bytes;
    assert_eq!(snapshot.others, cache, "{snapshot:?}");
}

#[test]
fn the_parts_add_up_while_threads_allocate_and_free() {
    const MODELS: usize = 3;
    let simulated = Simulated::new(SimConfig::new().unbacked());
    let options = EngineOptions::new().limit_bytes(24 * PAGE);
    let options = options.park_bytes_max(2 * PAGE).cache_bytes_max(2 * PAGE);
    let pool = pool(&simulated.device, options);
    for number in 0..MODELS {
        let mut options = ModelOptions::new(CAPACITY);
        options.guarantee_bytes = number * PAGE;
        options.ahead_bytes_max = number * PAGE;
        let registered = pool.register_model_with(&format!("model {number}"), options);
        registered.expect("a new name");
    }
    let done = AtomicBool::new(false);
    let taken = std::thread::scope(|scope| {
        let looks = scope.spawn(|| {
            let mut taken = 0;
            let mut before = Snapshot::default();
            while !done.load(Ordering::SeqCst) {
                let now = pool.snapshot();
                adds_up(&now);
                only_the_cache_has_no_account(&now);
                assert_eq!(now.accounts.len(), MODELS);
                let (was, is) = (before.counters, now.counters);
                assert!(was.ranges.allocations <= is.ranges.allocations);
                assert!(was.ranges.deallocations <= is.ranges.deallocations);
                assert!(was.device_calls <= is.device_calls);
                before = now;
                taken += 1;
            }
            taken
        });
        let work: Vec<_> = (0..MODELS)
            .map(|number| {
                let model = pool.model(&format!("model {number}")).expect("registered");
                scope.spawn(move || {
                    let mut random = SmallRng::seed_from_u64(number as u64);
                    let mut held: Vec<(usize, usize)> = Vec::new();
                    for _ in 0..3_000 {
                        let bytes = random.random_range(1..2 * PAGE);
                        let offset = random.random_range(0..CAPACITY - bytes);
                        if held.len() > 6 || (!held.is_empty() && random.random_bool(0.3)) {
                            let at = random.random_range(0..held.len());
                            let (offset, bytes) = held.swap_remove(at);
                            model.deallocate(offset, bytes).expect("live");
                        } else {
                            match model.try_allocate(offset, bytes) {
                                Ok(_) => held.push((offset, bytes)),
                                Err(VmmError::AlreadyMapped { .. }) => {}
                                Err(error) => assert!(error.is_retryable(), "{error}"),
                            }
                        }
                    }
                })
            })
            .collect();
        for thread in work {
            thread.join().expect("no panic");
        }
        done.store(true, Ordering::SeqCst);
        looks.join().expect("every look added up")
    });
    assert!(taken > 0);
}

#[test]
fn what_is_no_models_is_told_apart() {
    let simulated = Simulated::default();
    let options = manual().limit_bytes(16 * PAGE).park_bytes_max(16 * PAGE);
    let pool = pool(&simulated.device, options);
    pool.register_model("a", CAPACITY).expect("a new name");
    pool.allocate_for_model("a", 2 * PAGE).expect("room");
    let beside = VirtualMemoryPool::on_engine(pool.engine(), CAPACITY, PAGE).expect("a range");
    beside.allocate(0, 3 * PAGE).expect("room");
    beside.deallocate(0, PAGE).expect("live");
    let snapshot = pool.snapshot();
    adds_up(&snapshot);
    // A range that is made alone has an account of its own.
    assert_eq!(snapshot.others, MemoryParts::default());
    let [own, a] = &*snapshot.accounts else {
        panic!("{snapshot:?}");
    };
    assert_eq!((&*own.name, &*a.name), (beside.account().name(), "a"));
    assert!(own.name.starts_with('#'), "{snapshot:?}");
    let mut parts = MemoryParts::default();
    (parts.live_page_bytes, parts.retiring_bytes) = (2 * PAGE, PAGE);
    assert_eq!(own.stats.parts, parts);
    assert_eq!((own.stats.ranges, own.stats.live_bytes), (1, 2 * PAGE));
    assert_eq!(own.quota, Quota::new());
    assert_eq!(a.stats.committed_bytes, 2 * PAGE);
    assert_eq!(pool.engine().snapshot(), snapshot);

    // A model that is gone while the driver keeps its memory has left it to the engine.
    simulated.simulator.inject(Fault::always(
        DriverFunction::cuMemUnmap,
        CUDA_ERROR_UNKNOWN,
    ));
    pool.unregister_model("a").expect_err("the driver refuses");
    let snapshot = pool.snapshot();
    adds_up(&snapshot);
    let names = snapshot.accounts.iter().map(|account| &*account.name);
    assert_eq!(names.collect::<Vec<_>>(), [beside.account().name()]);
    let mut others = MemoryParts::default();
    others.quarantined_bytes = 2 * PAGE;
    assert_eq!(snapshot.others, others);
    simulated.simulator.clear_faults();
}

#[test]
fn accounts_of_pools_made_alone_have_names_of_their_own() {
    let simulated = Simulated::default();
    let engine = Engine::new(&simulated.device, manual()).expect("an engine");
    let range = || VirtualMemoryPool::on_engine(&engine, CAPACITY, PAGE).expect("a range");
    let first = range();
    let name = first.account().name().to_owned();
    let taken = engine.account(&name, Quota::new()).map(drop);
    let expected = VmmError::ModelAlreadyRegistered { model: name };
    assert_eq!(taken, Err(expected));
    // Names that such pools would get.
    let chosen = (0..9).filter_map(|number| {
        let name = format!("#{number}");
        engine.account(&name, Quota::new()).ok()
    });
    let _chosen: Vec<_> = chosen.collect();
    let _ranges = [range(), range()];
    let accounts = engine.snapshot().accounts;
    let mut names: Vec<_> = accounts.iter().map(|account| &account.name).collect();
    names.dedup();
    assert_eq!((names.len(), accounts.len()), (11, 11), "{names:?}");
}

#[test]
fn a_snapshot_has_the_quotas_of_a_model() {
    let simulated = Simulated::default();
    let pool = pool(&simulated.device, manual().limit_bytes(16 * PAGE));
    let mut options = ModelOptions::new(CAPACITY);
    options.guarantee_bytes = PAGE;
    options.ceiling_bytes = Some(3 * PAGE);
    pool.register_model_with("b", options).expect("a new name");
    pool.register_model("a", 2 * PAGE).expect("a new name");
    let models = pool.snapshot().accounts;
    let quotas = models.iter().map(|of| {
        let capacity_bytes = of.stats.capacity_bytes;
        (
            &*of.name,
            of.quota.guarantee_bytes,
            of.quota.ceiling_bytes,
            capacity_bytes,
        )
    });
    assert_eq!(
        quotas.collect::<Vec<_>>(),
        [
            ("a", 0, None, 2 * PAGE),
            ("b", PAGE, Some(3 * PAGE), CAPACITY)
        ]
    );
}

#[test]
fn each_counter_counts_what_it_says() {
    let simulated = Simulated::default();
    let options = manual().limit_bytes(4 * PAGE).cache_bytes_max(PAGE);
    let pool = pool(&simulated.device, options);
    let mut options = ModelOptions::new(CAPACITY);
    options.ahead_bytes_max = PAGE;
    pool.register_model_with("a", options).expect("a new name");
    let stream = Stream::new(&simulated.device).expect("a stream");
    let a = pool.model("a").expect("registered");
    a.use_stream(&stream).expect("of the device");
    let traced = |act: &dyn Fn()| {
        let before = pool.snapshot().counters;
        act();
        (before, pool.snapshot().counters)
    };

    // No step was taken, so nothing is there yet: create, map and set access.
    let (before, after) = traced(&|| a.allocate(0, PAGE).map(drop).expect("room"));
    assert_eq!(after.device_calls - before.device_calls, 3);
    assert_eq!(after.ranges.allocations, 1);
    assert_eq!(after.ranges.late_prefetches, 1);
    // The page behind is made by the step, and then there.
    pool.engine().step();
    let (before, after) = traced(&|| a.allocate(PAGE, PAGE).map(drop).expect("there"));
    assert_eq!(after.device_calls, before.device_calls);
    assert_eq!(after.ranges.late_prefetches, 1);
    // Bytes within a page.
    a.deallocate(PAGE, 8).expect("live");
    a.allocate(PAGE, 8).expect("there");
    assert_eq!(a.counters().allocations, 3);
    assert_eq!(a.counters().deallocations, 1);

    // What is refused, but not what is wrong.
    a.allocate(8 * PAGE, 5 * PAGE)
        .expect_err("more than the limit");
    a.try_allocate(8 * PAGE, 3 * PAGE)
        .expect_err("more than is free");
    a.allocate(0, PAGE).expect_err("live already");
    assert_eq!(a.counters().refusals, 2);

    // The device has none, although the budget has room; and then it has.
    let fault = Fault::nth_of(DriverFunction::cuMemCreate, 1, CUDA_ERROR_OUT_OF_MEMORY);
    simulated.simulator.inject(fault);
    a.allocate(8 * PAGE, PAGE).expect("at the second try");
    assert_eq!(pool.snapshot().counters.device_shortages, 1);

    // Freed, overwritten for the cache, and refused once when it goes on from there.
    let held = simulated.hold_work();
    // SAFETY: live, and mapped until the engine has seen the fence.
    unsafe { stream.memset(a.base_address(), 1, PAGE) }.expect("queued");
    a.deallocate(0, PAGE).expect("live");
    assert_eq!(pool.snapshot().counters.scrubbed_bytes, 0);
    drop(held);
    stream.synchronize().expect("done");
    pool.engine().step();
    assert_eq!(pool.snapshot().counters.scrubbed_bytes, PAGE as u64);
    assert_eq!(pool.snapshot().counters.retries, 0);
    simulated.device.synchronize().expect("done");
    pool.engine().step();
    let fault = Fault::nth_of(DriverFunction::cuMemRelease, 1, CUDA_ERROR_UNKNOWN);
    simulated.simulator.inject(fault);
    pool.trim().expect_err("refused");
    pool.trim().expect("not again");
    assert_eq!(pool.snapshot().counters.retries, 1);

    // What has happened on a range stays in the engine's numbers when the range is gone.
    let before = pool.snapshot().counters.ranges;
    assert_eq!(before, a.counters());
    assert_eq!(pool.snapshot().accounts[0].counters, before);
    pool.unregister_model("a").expect("registered");
    assert_eq!(pool.snapshot().counters.ranges, before);
    assert_eq!(a.counters(), before, "the range is there");
    drop(a);
    assert_eq!(pool.snapshot().counters.ranges, before);
}

#[test]
fn a_wait_for_the_device_is_counted() {
    let simulated = Simulated::default();
    let pool = pool(&simulated.device, manual().limit_bytes(2 * PAGE));
    pool.register_model("a", CAPACITY).expect("a new name");
    let stream = Stream::new(&simulated.device).expect("a stream");
    let a = pool.model("a").expect("registered");
    a.use_stream(&stream).expect("of the device");
    a.allocate(0, 2 * PAGE).expect("room");
    let held = simulated.hold_work();
    // SAFETY: live, and mapped until the engine has seen the fence.
    unsafe { stream.memset(a.base_address(), 1, PAGE) }.expect("queued");
    a.deallocate(0, 2 * PAGE).expect("live");
    a.try_allocate(8 * PAGE, PAGE).expect_err("still in use");
    assert_eq!(pool.snapshot().counters.waits, 0);
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| a.allocate(8 * PAGE, PAGE));
        while pool.snapshot().counters.waits == 0 {
            std::thread::yield_now();
        }
        drop(held);
        waits.join().expect("no panic").expect("the device is done");
    });
    assert!(pool.snapshot().counters.waits >= 1);
}

#[cfg(feature = "serde")]
#[test]
fn a_snapshot_can_be_written_and_read() {
    let simulated = Simulated::default();
    let pool = pool(&simulated.device, manual().limit_bytes(16 * PAGE));
    let mut options = ModelOptions::new(CAPACITY);
    options.ceiling_bytes = Some(9 * PAGE);
    pool.register_model_with(NAME, options).expect("a new name");
    pool.register_model("other", CAPACITY).expect("a new name");
    pool.allocate_for_model(NAME, 3).expect("room");
    let snapshot = pool.snapshot();
    let text = serde_json::to_string(&snapshot).expect("JSON");
    assert_eq!(
        serde_json::from_str::<Snapshot>(&text).expect("the same"),
        snapshot
    );
    let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(value["engine"]["parts"]["live_page_bytes"], PAGE);
    assert_eq!(value["counters"]["ranges"]["allocations"], 1);
    assert_eq!(value["accounts"][0]["name"], NAME);
    assert_eq!(value["accounts"][0]["stats"]["live_bytes"], 3);
    assert_eq!(value["accounts"][0]["quota"]["ceiling_bytes"], 9 * PAGE);
    assert!(value["accounts"][1]["quota"]["ceiling_bytes"].is_null());
    // Written by a version that knew less.
    let old = serde_json::from_str::<Snapshot>("{\"accounts\": [{\"name\": \"a\"}]}");
    let old = old.expect("what is missing is zero");
    assert_eq!(
        (&*old.accounts[0].name, old.engine.parts.live_page_bytes),
        ("a", 0)
    );
}

#[derive(Debug, Clone)]
enum Act {
    Allocate(usize, usize, usize),
    Free(usize, usize, usize),
    Step,
    Trim,
    Unregister(usize),
    Fail(u64),
}

fn act() -> impl Strategy<Value = Act> {
    let place = (0..2usize, 0..24usize, 1..8usize);
    prop_oneof![
        6 => place.clone().prop_map(|(model, at, size)| Act::Allocate(model, at, size)),
        4 => place.prop_map(|(model, at, size)| Act::Free(model, at, size)),
        2 => Just(Act::Step),
        1 => Just(Act::Trim),
        1 => (0..2usize).prop_map(Act::Unregister),
        2 => (1..6u64).prop_map(Act::Fail),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_parts_add_up_whatever_happens(acts in prop::collection::vec(act(), 1..60)) {
        let simulated = Simulated::new(SimConfig::new().unbacked());
        let options = manual().limit_bytes(9 * PAGE).park_bytes_max(PAGE).cache_bytes_max(2 * PAGE);
        let pool = pool(&simulated.device, options);
        let model = |number: usize| if number == 0 { "a" } else { "b" };
        for act in acts {
            for number in 0..2 {
                let mut options = ModelOptions::new(CAPACITY);
                options.ahead_bytes_max = number * 2 * PAGE;
                let _ = pool.register_model_with(model(number), options);
            }
            // Some of it is wrong, some fails; the numbers hold all the same.
            let half = PAGE / 2;
            match act {
                Act::Allocate(of, at, size) => drop(pool.allocate_for_model_at(model(of), at * half, size * half)),
                Act::Free(of, at, size) => drop(pool.deallocate_for_model(model(of), at * half, size * half)),
                Act::Step => drop(pool.engine().step()),
                Act::Trim => drop(pool.trim()),
                Act::Unregister(of) => drop(pool.unregister_model(model(of))),
                Act::Fail(nth) => simulated.simulator.inject(Fault::nth_call(nth, CUDA_ERROR_UNKNOWN)),
            }
            adds_up(&pool.snapshot());
        }
        simulated.simulator.clear_faults();
    }
}
