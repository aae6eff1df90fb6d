//! Another allocator beside the pool: it runs out and is relieved, or the pool does and others make
//! room.

use crate::common::{ModelOptions, Models, PAGE, Simulated, failure, manual, with_context};
use crate::{CAPACITY, pool};
use cuda_vmm::sim::{Fault, SimConfig};
use cuda_vmm::sys::{
    CUDA_ERROR_OPERATING_SYSTEM, CUDA_ERROR_OUT_OF_MEMORY, CUDA_SUCCESS, CUdeviceptr, CUresult,
    DriverFunction,
};
use cuda_vmm::{Device, Engine, EngineOptions, PhysicalMemory, VirtualMemoryPool, VmmError};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// Longer than any wait here is; a test that fails ends all the same.
const FOREVER: Duration = Duration::from_secs(60);

/// What the device has.
const MEMORY: usize = 8 * PAGE;

/// Memory of another allocator (`cuMemAlloc`), until it is dropped.
struct Plain {
    device: Device,
    address: CUdeviceptr,
}

impl Plain {
    fn new(device: &Device, bytes: usize) -> Result<Self, CUresult> {
        let mut address = 0;
        // SAFETY: `address` is a valid place, and the context is current.
        let allocate = || unsafe { (device.driver().table().cuMemAlloc)(&mut address, bytes) };
        match with_context(device, allocate) {
            CUDA_SUCCESS => Ok(Self {
                device: device.clone(),
                address,
            }),
            code => Err(code),
        }
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        // SAFETY: it was allocated, and nothing uses it.
        let free = || unsafe { (self.device.driver().table().cuMemFree)(self.address) };
        assert_eq!(with_context(&self.device, free), CUDA_SUCCESS);
    }
}

fn small_device() -> Simulated {
    Simulated::new(SimConfig::new().memory_bytes(MEMORY))
}

/// A pool whose limit is more than the device has, and which keeps what is freed; with one model.
fn greedy(device: &Device, options: EngineOptions) -> Models {
    let pool = pool(device, options.limit_bytes(100 * PAGE));
    let options = ModelOptions {
        ahead_bytes_max: PAGE,
        ..ModelOptions::new(CAPACITY)
    };
    pool.register_model_with("a", options).expect("addresses");
    pool
}

#[test]
fn headroom_is_left_for_others() {
    let simulated = small_device();
    let pool = pool(&simulated.device, manual().headroom_bytes(3 * PAGE));
    pool.register_model("a", CAPACITY).expect("addresses");
    let error = pool
        .allocate_for_model("a", 6 * PAGE)
        .expect_err("headroom");
    assert!(
        matches!(error, VmmError::OutOfPhysicalMemory { limit_bytes, .. } if limit_bytes == 5 * PAGE),
        "{error}"
    );
    pool.allocate_for_model("a", 5 * PAGE).expect("room");
    let _others = Plain::new(&simulated.device, 3 * PAGE).expect("was left for it");
}

#[test]
fn another_allocator_that_runs_out_is_relieved_with_what_can_be_spared() {
    let simulated = small_device();
    let keeps = manual().park_bytes_max(MEMORY).cache_bytes_max(2 * PAGE);
    let pool = greedy(&simulated.device, keeps);
    pool.allocate_for_model_at("a", 0, 6 * PAGE).expect("room");
    pool.engine().step();
    pool.deallocate_for_model("a", 0, 5 * PAGE).expect("live");
    pool.engine().step();
    let stats = pool.stats();
    assert_eq!(
        (stats.parts.parked_bytes, stats.parts.ahead_bytes),
        (5 * PAGE, PAGE)
    );
    let refused = Plain::new(&simulated.device, 3 * PAGE).err();
    assert_eq!(refused, Some(CUDA_ERROR_OUT_OF_MEMORY));
    assert_eq!(pool.relieve(0), 0);
    assert_eq!(
        pool.relieve(2 * PAGE - 1),
        2 * PAGE,
        "whole pages, what is ahead first"
    );
    assert_eq!(pool.stats().parts.ahead_bytes, 0);
    let others = Plain::new(&simulated.device, 3 * PAGE).expect("it was relieved");
    assert_eq!(pool.relieve(usize::MAX), 4 * PAGE, "all that is not live");
    assert_eq!(pool.stats().committed_bytes, PAGE);
    assert_eq!(pool.engine().relieve(1), 0);
    drop(others);
}

#[test]
fn what_is_cached_is_given_for_relief_too() {
    let simulated = small_device();
    let pool = greedy(&simulated.device, manual().cache_bytes_max(MEMORY));
    pool.allocate_for_model_at("a", 0, 6 * PAGE).expect("room");
    pool.deallocate_for_model("a", 0, 6 * PAGE).expect("live");
    while pool.stats().parts.cached_bytes < 6 * PAGE {
        pool.engine().step();
    }
    let given_bytes = pool.relieve(6 * PAGE);
    assert!(given_bytes >= 6 * PAGE, "{given_bytes}");
    let _others = Plain::new(&simulated.device, 6 * PAGE).expect("it was relieved");
}

#[test]
fn a_pool_that_runs_out_has_its_engines_relieved_and_then_others_make_room() {
    let simulated = small_device();
    let device = &simulated.device;
    let parks = manual().park_bytes_max(MEMORY).limit_bytes(MEMORY);
    let other = Engine::new(device, parks).expect("an engine");
    let parked = VirtualMemoryPool::on_engine(&other, 2 * PAGE, PAGE).expect("addresses");
    parked.allocate(0, 2 * PAGE).expect("room");
    parked.deallocate(0, 2 * PAGE).expect("live");
    other.step();
    assert_eq!(other.stats().parts.parked_bytes, 2 * PAGE);
    let cached = Arc::new(Mutex::new(vec![
        Plain::new(device, 3 * PAGE).expect("room"),
    ]));
    let pool = greedy(device, manual());
    let asked = Arc::new(Mutex::new(Vec::new()));
    let make_room = {
        let (cached, asked, pool) = (cached.clone(), asked.clone(), pool.clone());
        move |bytes| {
            // No lock is held, and what is being made is counted.
            let stats = pool.stats();
            assert_eq!(stats.parts.total_bytes(), stats.committed_bytes);
            asked
                .lock()
                .expect("no panic")
                .push((bytes, other.stats().parts.parked_bytes));
            cached.lock().expect("no panic").clear();
        }
    };
    device.set_make_room(Some(Arc::new(make_room)));
    pool.allocate_for_model_at("a", 0, 5 * PAGE)
        .expect("what the other engine had parked");
    assert_eq!(*asked.lock().expect("no panic"), [], "that was enough");
    pool.allocate_for_model_at("a", 5 * PAGE, 3 * PAGE)
        .expect("what others made room for");
    assert_eq!(*asked.lock().expect("no panic"), [(PAGE, 0)], "once");
    let error = pool
        .allocate_for_model_at("a", 8 * PAGE, 2 * PAGE)
        .expect_err("there is no more");
    assert_eq!(error, failure!(cuMemCreate, CUDA_ERROR_OUT_OF_MEMORY));
    assert_eq!(
        asked.lock().expect("no panic").len(),
        2,
        "once more, and then the error"
    );
    assert_eq!(simulated.books().physical_bytes, MEMORY);
    device.set_make_room(None);
    assert_eq!(Arc::strong_count(&asked), 1, "it is gone");
    pool.allocate_for_model_at("a", 8 * PAGE, PAGE)
        .expect_err("there is no more");
    assert_eq!(asked.lock().expect("no panic").len(), 2);
}

#[test]
fn a_panic_in_what_makes_room_harms_no_caller() {
    let simulated = small_device();
    let device = &simulated.device;
    let pool = greedy(device, manual());
    pool.allocate_for_model_at("a", 0, 7 * PAGE).expect("room");
    static CALLED: AtomicUsize = AtomicUsize::new(0);
    device.set_make_room(Some(Arc::new(|_| {
        CALLED.fetch_add(1, Ordering::SeqCst);
        panic!("it does nothing");
    })));
    let before = (pool.stats(), simulated.books());
    let error = pool
        .allocate_for_model_at("a", 7 * PAGE, 2 * PAGE)
        .expect_err("there is no more");
    assert_eq!(error, failure!(cuMemCreate, CUDA_ERROR_OUT_OF_MEMORY));
    assert_eq!((pool.stats(), simulated.books()), before);
    assert_eq!(CALLED.load(Ordering::SeqCst), 1);
    pool.allocate_for_model_at("a", 7 * PAGE, PAGE)
        .expect("room");
}

#[test]
fn memory_made_ahead_asks_for_no_room() {
    let simulated = small_device();
    let pool = greedy(&simulated.device, manual());
    static CALLED: AtomicUsize = AtomicUsize::new(0);
    simulated.device.set_make_room(Some(Arc::new(|_| {
        CALLED.fetch_add(1, Ordering::SeqCst);
    })));
    pool.allocate_for_model_at("a", 0, 8 * PAGE).expect("room");
    assert_eq!(pool.engine().step().prefetched_bytes, 0);
    assert_eq!(CALLED.load(Ordering::SeqCst), 0);
}

/// An engine whose limit is far above the device's memory and which keeps all that is freed, with a
/// pool on it.
fn keeper(device: &Device, options: EngineOptions) -> (Engine, VirtualMemoryPool) {
    let options = options.limit_bytes(1 << 40).park_bytes_max(1 << 40);
    let engine = Engine::new(device, options).expect("an engine");
    let pool = VirtualMemoryPool::on_engine(&engine, 64 * PAGE, PAGE).expect("addresses");
    (engine, pool)
}

#[test]
fn a_missing_page_takes_one_page_from_another_engine_after_its_own() {
    let simulated = small_device();
    let device = &simulated.device;
    let (own, asks) = keeper(device, manual().chunk_bytes_max(0));
    let (other, kept) = keeper(device, manual().chunk_bytes_max(0));
    kept.allocate(0, 5 * PAGE).expect("room");
    kept.deallocate(0, 5 * PAGE).expect("live");
    asks.allocate(0, 3 * PAGE).expect("room");
    asks.deallocate(2 * PAGE, PAGE).expect("live");
    own.step();
    other.step();
    let parked = || [&own, &other].map(|engine| engine.stats().parts.parked_bytes / PAGE);
    assert_eq!(parked(), [1, 5]);
    asks.allocate(8 * PAGE, PAGE).expect("of its own");
    assert_eq!(parked(), [0, 5]);
    asks.allocate(9 * PAGE, PAGE).expect("of the other's");
    assert_eq!(parked(), [0, 4]);
    asks.allocate(10 * PAGE, 2 * PAGE).expect("of the other's");
    assert_eq!(parked(), [0, 2]);
    // More than there is takes all that can be spared, and gives back what it had.
    asks.allocate(16 * PAGE, 3 * PAGE)
        .expect_err("there is no more");
    assert_eq!(parked(), [0, 0]);
    assert_eq!(simulated.books().physical_bytes, 6 * PAGE);
}

#[test]
fn a_large_chunk_takes_as_many_pages_as_are_missing() {
    let simulated = Simulated::new(SimConfig::new().memory_bytes(40 * PAGE));
    let (_own, asks) = keeper(&simulated.device, manual());
    let (other, kept) = keeper(&simulated.device, manual().chunk_bytes_max(0));
    kept.allocate(0, 38 * PAGE).expect("room");
    kept.deallocate(0, 38 * PAGE).expect("live");
    other.step();
    let single = cuda_vmm::PoolOptions::new().single_handle(true);
    let asks = VirtualMemoryPool::with_options(asks.engine(), 64 * PAGE, PAGE, single);
    asks.expect("addresses")
        .allocate(0, 8 * PAGE)
        .expect("room");
    assert_eq!(other.stats().parts.parked_bytes, 32 * PAGE, "two were free");
}

#[test]
fn threads_that_are_short_at_once_take_what_they_need() {
    const THREADS: usize = 8;
    let simulated = Simulated::new(SimConfig::new().memory_bytes(64 * PAGE));
    let (other, kept) = keeper(&simulated.device, manual().chunk_bytes_max(0));
    kept.allocate(0, 64 * PAGE).expect("room");
    kept.deallocate(0, 64 * PAGE).expect("live");
    other.step();
    let barrier = Barrier::new(THREADS);
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                let (_engine, pool) = keeper(&simulated.device, manual().chunk_bytes_max(0));
                barrier.wait();
                pool.allocate(0, PAGE).expect("what the other has parked");
                barrier.wait();
            });
        }
    });
    let taken = 64 - other.stats().parts.parked_bytes / PAGE;
    // Each may give up a piece that another thread then has.
    assert!((THREADS..=2 * THREADS).contains(&taken), "{taken} pages");
}

#[test]
fn a_driver_that_takes_nothing_back_costs_another_engine_one_piece() {
    let simulated = small_device();
    let (_own, asks) = keeper(&simulated.device, manual());
    let (other, kept) = keeper(&simulated.device, manual().chunk_bytes_max(0));
    kept.allocate(0, 8 * PAGE).expect("room");
    kept.deallocate(0, 8 * PAGE).expect("live");
    other.step();
    let refuse = Fault::always(DriverFunction::cuMemUnmap, CUDA_ERROR_OPERATING_SYSTEM);
    simulated.simulator.inject(refuse);
    let error = asks.allocate(0, PAGE).expect_err("nothing comes back");
    assert_eq!(error, failure!(cuMemCreate, CUDA_ERROR_OUT_OF_MEMORY));
    let stats = other.stats();
    assert_eq!(
        (stats.parts.parked_bytes, stats.parts.quarantined_bytes),
        (7 * PAGE, PAGE)
    );
    simulated.simulator.clear_faults();
    asks.allocate(0, PAGE).expect("tried again");
}

#[test]
fn a_wait_ends_when_the_device_has_memory_again() {
    for options in [EngineOptions::new(), manual()] {
        let simulated = small_device();
        let device = &simulated.device;
        let pool = greedy(device, options);
        pool.register_model("b", CAPACITY).expect("addresses");
        pool.allocate_for_model_at("b", 0, 2 * PAGE).expect("room");
        let others = Plain::new(device, 5 * PAGE).expect("room");
        let a = pool.model("a").expect("registered");
        let error = a.allocate_timeout(0, 2 * PAGE, Duration::from_millis(5));
        assert_eq!(error, Err(failure!(cuMemCreate, CUDA_ERROR_OUT_OF_MEMORY)));
        let (began, waits) = (Instant::now(), pool.snapshot().counters.waits);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| a.allocate_timeout(0, 2 * PAGE, FOREVER));
            while pool.snapshot().counters.waits == waits && !waiting.is_finished() {
                assert!(began.elapsed() < FOREVER, "it waits");
                thread::yield_now();
            }
            // Others of the same budget go on meanwhile, and nothing is held for the one that
            // waits.
            pool.model("b")
                .and_then(|b| b.allocate_timeout(2 * PAGE, PAGE, FOREVER))
                .expect("the last page");
            pool.deallocate_for_model("b", 2 * PAGE, PAGE)
                .expect("live");
            while pool.stats().parts.filling_bytes > 0 {
                assert!(began.elapsed() < FOREVER, "between two tries");
                thread::yield_now();
            }
            assert!(!waiting.is_finished());
            drop(others);
            waiting.join().expect("no panic").expect("it came free");
        });
        assert_eq!(a.stats().live_pages, 2);
        assert_eq!(pool.model_owed_bytes("b"), Some(0), "the budget had room");
    }
}

#[test]
fn a_wait_for_the_device_ends_with_what_another_engine_frees() {
    for frees in [
        EngineOptions::new(),
        EngineOptions::new().park_bytes_max(1 << 40),
    ] {
        let simulated = small_device();
        let device = &simulated.device;
        let other = Engine::new(device, frees).expect("an engine");
        let held = VirtualMemoryPool::on_engine(&other, 8 * PAGE, PAGE).expect("addresses");
        held.allocate(0, 8 * PAGE).expect("room");
        let (engine, asks) = keeper(device, EngineOptions::new());
        thread::scope(|scope| {
            let waiting = scope.spawn(|| asks.allocate_timeout(0, PAGE, FOREVER));
            while engine.counters().waits == 0 && !waiting.is_finished() {
                thread::yield_now();
            }
            held.deallocate(0, PAGE).expect("live");
            waiting.join().expect("no panic").expect("it came free");
        });
        assert_eq!(asks.stats().live_pages, 1);
    }
}

#[test]
fn a_wait_for_the_device_asks_others_for_room_each_time_and_is_told_of_once() {
    let simulated = small_device();
    let pool = greedy(&simulated.device, manual());
    let others = Mutex::new(Some(Plain::new(&simulated.device, 8 * PAGE).expect("room")));
    let asked = Arc::new(AtomicUsize::new(0));
    let make_room = {
        let asked = asked.clone();
        move |_: usize| {
            if asked.fetch_add(1, Ordering::SeqCst) == 3 {
                others.lock().expect("no panic").take();
            }
        }
    };
    simulated.device.set_make_room(Some(Arc::new(make_room)));
    let told = crate::common::told::told(|| {
        pool.allocate_for_model_timeout("a", PAGE, FOREVER)
            .expect("the fourth time");
    });
    assert_eq!(asked.load(Ordering::SeqCst), 4);
    let warnings = told
        .iter()
        .filter(|(level, _)| *level == tracing::Level::WARN);
    assert_eq!(warnings.count(), 1, "{told:?}");
    assert_eq!(pool.snapshot().counters.device_shortages, 1);
    simulated.device.set_make_room(None);
}

/// What the driver refused to take back, from an engine or from a dropped object, is asked for
/// again before an allocation is refused.
#[test]
fn a_pool_that_runs_out_retries_what_the_driver_refused() {
    use DriverFunction::{cuMemRelease, cuMemUnmap};
    for refused in [cuMemUnmap, cuMemRelease] {
        let simulated = small_device();
        let device = &simulated.device;
        let other = Engine::new(device, manual().limit_bytes(MEMORY)).expect("an engine");
        let parted = VirtualMemoryPool::on_engine(&other, 2 * PAGE, PAGE).expect("addresses");
        parted.allocate(0, 2 * PAGE).expect("room");
        parted.deallocate(0, 2 * PAGE).expect("live");
        let dropped = PhysicalMemory::new(device, 3 * PAGE).expect("room");
        for call in [refused, cuMemRelease] {
            let fault = Fault::always(call, CUDA_ERROR_OPERATING_SYSTEM);
            simulated.simulator.inject(fault);
        }
        drop(dropped);
        other.step();
        let held = (
            device.quarantined_bytes(),
            other.stats().parts.quarantined_bytes,
        );
        assert_eq!(held, (3 * PAGE, 2 * PAGE));
        simulated.simulator.clear_faults();
        let pool = greedy(device, manual());
        pool.allocate_for_model_at("a", 0, MEMORY)
            .expect("the driver takes it back now");
        assert_eq!(simulated.books().physical_bytes, MEMORY);
    }
}
