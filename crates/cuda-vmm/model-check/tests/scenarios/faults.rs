//! A driver call fails in one thread while the other uses neighbouring pages.

use crate::books::{Books, PAGE, books};
use crate::explore::explore;
use crate::world::{World, assert_adds_up, pool, settle, write};
use cuda_vmm::sys::{CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_OUT_OF_MEMORY, CUresult, DriverFunction};
use cuda_vmm::{Engine, EngineOptions, VirtualMemoryPool, VmmError, WorkerMode};
use shuttle::rand::{Rng, thread_rng};
use shuttle::thread;
use std::sync::Arc;

const HALF: usize = PAGE / 2;

/// Takes bytes and gives them back. A call that fails may show, and then nothing was taken.
fn take_and_give(pool: &VirtualMemoryPool, offset: usize, bytes: usize) {
    let stream = cuda_vmm::Stream::new(pool.engine().device()).expect("no such call fails");
    match pool.allocate(offset, bytes) {
        Ok(address) => {
            write(&stream, address, bytes);
            pool.deallocate(offset, bytes).expect("live");
        }
        Err(error) => {
            let known = matches!(error, VmmError::Driver(_) | VmmError::Quarantined { .. });
            assert!(known || error.is_retryable(), "{error}");
            assert!(!pool.is_mapped(offset, bytes));
        }
    }
    assert_adds_up(pool.engine());
}

/// Two threads meet on a page; some of these calls fail, at any place.
fn neighbours(mode: WorkerMode, calls: &[DriverFunction], code: CUresult) {
    // An old driver where what fails is what only an old one is asked for.
    let world = World::new(!calls.contains(&DriverFunction::cuCtxSynchronize));
    let engine = world.engine(3, mode);
    let pool = Arc::new(pool(&engine, 3));
    books(|books| {
        for call in calls {
            books.fail(*call, thread_rng().gen_range(0..4), code);
        }
    });
    let other = thread::spawn({
        let pool = pool.clone();
        move || {
            take_and_give(&pool, 0, HALF);
            take_and_give(&pool, 0, HALF);
        }
    });
    take_and_give(&pool, HALF, 2 * PAGE);
    other.join().expect("no thread fails");
    books(Books::fail_no_more);
    settle(&engine, mode);
    pool.allocate(0, 3 * PAGE)
        .expect("everything is there again");
    drop((pool, engine));
    world.end();
}

/// The last call that gives something back fails while its pool is dropped and another one retries.
fn dropped_with_a_refusal(call: DriverFunction) {
    let world = World::new(true);
    let engine = world.engine(2, WorkerMode::Thread);
    let (ending, staying) = (pool(&engine, 2), pool(&engine, 2));
    ending.allocate(0, PAGE).expect("room");
    books(|books| {
        for _ in 0..2 {
            books.fail(call, thread_rng().gen_range(0..2), CUDA_ERROR_INVALID_VALUE);
        }
    });
    let other = thread::spawn(move || take_and_give(&staying, 0, 2 * PAGE));
    drop(ending);
    other.join().expect("no thread fails");
    books(Books::fail_no_more);
    settle(&engine, WorkerMode::Thread);
    let device = world.device.clone();
    drop(engine);
    // Addresses that could not be freed are the device's.
    while device.quarantined_bytes() + device.quarantined_address_bytes() > 0 {
        device.retry_quarantine();
        thread::yield_now();
    }
    drop(device);
    world.end();
}

/// Where unused memory is.
#[derive(Clone, Copy)]
enum Kept {
    Parked,
    Cached,
}

/// Each way in which the driver may refuse memory that is given up.
const REFUSALS: [(Kept, DriverFunction); 3] = [
    (Kept::Parked, DriverFunction::cuMemUnmap),
    (Kept::Parked, DriverFunction::cuMemRelease),
    (Kept::Cached, DriverFunction::cuMemRelease),
];

/// An engine whose budget is one page, which no allocation uses, and the pool that had it.
fn keeping(world: &World, mode: WorkerMode, kept: Kept) -> (Engine, VirtualMemoryPool) {
    let options = EngineOptions::new().worker(mode);
    let options = match kept {
        Kept::Parked => options.park_bytes_max(PAGE),
        Kept::Cached => options.cache_bytes_max(PAGE),
    };
    let engine = world.engine_with(1, options);
    let pool = pool(&engine, 1);
    pool.allocate(0, PAGE).expect("room");
    pool.deallocate(0, PAGE).expect("live");
    let is_kept = || match kept {
        Kept::Parked => engine.stats().parts.parked_bytes == PAGE,
        Kept::Cached => engine.stats().parts.cached_bytes == PAGE,
    };
    while !is_kept() {
        if mode == WorkerMode::Manual {
            engine.step();
        }
        thread::yield_now();
    }
    (engine, pool)
}

/// The driver refuses what a thread gives up and for which another one waits: that one is woken,
/// though nothing came free.
fn refused_while_another_waits(kept: Kept, call: DriverFunction) {
    let world = World::new(true);
    let (engine, had) = keeping(&world, WorkerMode::Manual, kept);
    let wants = pool(&engine, 1);
    books(|books| books.fail(call, 0, CUDA_ERROR_INVALID_VALUE));
    let giving = thread::spawn({
        let engine = engine.clone();
        move || _ = engine.trim()
    });
    while let Err(error) = wants.allocate(0, PAGE) {
        let known = matches!(error, VmmError::Driver(_)) || error.is_retryable();
        assert!(known, "{error}");
        engine.step();
        thread::yield_now();
    }
    giving.join().expect("no thread fails");
    drop((had, wants, engine));
    world.end();
}

/// The driver refuses once what another thread than the worker gives up: the worker is woken, and
/// tries again.
fn refused_while_the_worker_sleeps(kept: Kept, call: DriverFunction) {
    let world = World::new(true);
    let (engine, had) = keeping(&world, WorkerMode::Thread, kept);
    books(|books| books.fail(call, 0, CUDA_ERROR_INVALID_VALUE));
    engine.trim().expect_err("it is refused");
    settle(&engine, WorkerMode::Thread);
    drop((had, engine));
    world.end();
}

#[test]
fn a_thread_that_waits_for_what_the_driver_refuses_is_told() {
    for (kept, call) in REFUSALS {
        explore(move || refused_while_another_waits(kept, call));
    }
}

#[test]
fn what_the_driver_refuses_wakes_the_worker() {
    for (kept, call) in REFUSALS {
        explore(move || refused_while_the_worker_sleeps(kept, call));
    }
}

#[test]
fn a_filling_fails_beside_a_neighbour() {
    use DriverFunction::{cuMemCreate, cuMemMap, cuMemSetAccess};
    for call in [cuMemCreate, cuMemMap, cuMemSetAccess] {
        explore(move || neighbours(WorkerMode::Thread, &[call], CUDA_ERROR_INVALID_VALUE));
    }
}

#[test]
fn the_device_runs_out_beside_a_neighbour() {
    let calls = [DriverFunction::cuMemCreate, DriverFunction::cuMemMap];
    explore(move || neighbours(WorkerMode::Thread, &calls, CUDA_ERROR_OUT_OF_MEMORY));
}

#[test]
fn a_filling_fails_and_its_undoing_too() {
    use DriverFunction::{cuMemMap, cuMemRelease, cuMemSetAccess, cuMemUnmap};
    let calls = [cuMemMap, cuMemSetAccess, cuMemUnmap, cuMemRelease];
    explore(move || neighbours(WorkerMode::Thread, &calls, CUDA_ERROR_INVALID_VALUE));
    explore(move || neighbours(WorkerMode::Manual, &calls, CUDA_ERROR_INVALID_VALUE));
}

#[test]
fn a_fence_cannot_be_had() {
    use DriverFunction::{cuCtxRecordEvent, cuEventCreate, cuEventQuery, cuEventSynchronize};
    let calls = [
        cuCtxRecordEvent,
        cuEventCreate,
        cuEventQuery,
        cuEventSynchronize,
    ];
    explore(move || neighbours(WorkerMode::Thread, &calls, CUDA_ERROR_INVALID_VALUE));
}

#[test]
fn a_context_synchronise_fails() {
    let calls = [DriverFunction::cuCtxSynchronize; 2];
    explore(move || neighbours(WorkerMode::Thread, &calls, CUDA_ERROR_INVALID_VALUE));
    explore(move || neighbours(WorkerMode::Manual, &calls, CUDA_ERROR_INVALID_VALUE));
}

#[test]
fn a_pool_is_dropped_while_the_driver_refuses() {
    use DriverFunction::{cuMemAddressFree, cuMemRelease, cuMemUnmap};
    for call in [cuMemUnmap, cuMemRelease, cuMemAddressFree] {
        explore(move || dropped_with_a_refusal(call));
    }
}
