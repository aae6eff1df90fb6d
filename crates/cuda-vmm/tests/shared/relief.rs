//! Another allocator beside the pool: it runs out and is relieved, or the pool does and others make room.

use crate::common::{PAGE, Simulated, failure, manual, with_context};
use crate::{CAPACITY, pool};
use cuda_vmm::sim::{Fault, SimConfig};
use cuda_vmm::sys::{
    CUDA_ERROR_OPERATING_SYSTEM, CUDA_ERROR_OUT_OF_MEMORY, CUDA_SUCCESS, CUdeviceptr, CUresult,
    DriverFunction,
};
use cuda_vmm::{
    Device, Engine, EngineOptions, ModelOptions, PhysicalMemory, SharedMemoryPool,
    VirtualMemoryPool, VmmError,
};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

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
fn greedy(device: &Device, options: EngineOptions) -> SharedMemoryPool {
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
    assert_eq!((stats.parked_bytes, stats.ahead_bytes), (5 * PAGE, PAGE));
    let refused = Plain::new(&simulated.device, 3 * PAGE).err();
    assert_eq!(refused, Some(CUDA_ERROR_OUT_OF_MEMORY));
    assert_eq!(pool.relieve(0), 0);
    assert_eq!(
        pool.relieve(2 * PAGE - 1),
        2 * PAGE,
        "whole pages, what is ahead first"
    );
    assert_eq!(pool.stats().ahead_bytes, 0);
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
    while pool.stats().cached_bytes < 6 * PAGE {
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
    assert_eq!(other.stats().parked_bytes, 2 * PAGE);
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
            assert_eq!(stats.parts_bytes(), stats.committed_bytes);
            asked
                .lock()
                .expect("no panic")
                .push((bytes, other.stats().parked_bytes));
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
fn a_panic_in_what_makes_room_harms_nobody() {
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
fn memory_made_ahead_asks_nobody_for_room() {
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

/// What the driver refused to take back, from an engine or from a dropped object, is asked for again before an
/// allocation is refused.
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
        let held = (device.quarantined_bytes(), other.stats().quarantined_bytes);
        assert_eq!(held, (3 * PAGE, 2 * PAGE));
        simulated.simulator.clear_faults();
        let pool = greedy(device, manual());
        pool.allocate_for_model_at("a", 0, MEMORY)
            .expect("the driver takes it back now");
        assert_eq!(simulated.books().physical_bytes, MEMORY);
    }
}
