//! Parked pages are taken back and freed under their range's lock alone, while others hold the
//! engine's.

use crate::books::{PAGE, books};
use crate::explore::explore;
use crate::models::Models;
use crate::world::{World, assert_adds_up, insist, pool, write};
use cuda_vmm::{EngineOptions, SharedPoolOptions, VmmError, WorkerMode};
use shuttle::thread;
use std::sync::Arc;

/// Each of two threads takes its own page back again and again, and two pages are parked at most;
/// another needs one of them, and one more trims and looks at the numbers.
fn taken_back_while_given_up(mode: WorkerMode) {
    let world = World::new(true);
    books(|books| books.in_order = true);
    let options = EngineOptions::new().park_bytes_max(2 * PAGE).worker(mode);
    let engine = world.engine_with(2, options);
    let taking = [(); 2].map(|()| {
        let (pool, stream) = (pool(&engine, 2), world.stream());
        pool.use_stream(&stream).expect("same device");
        thread::spawn(move || {
            for _ in 0..3 {
                let address = insist(&pool, 0, PAGE);
                write(&stream, address, PAGE);
                assert_adds_up(pool.engine());
                pool.deallocate(0, PAGE).expect("live");
            }
        })
    });
    let needing = thread::spawn({
        let pool = pool(&engine, 1);
        move || {
            insist(&pool, 0, PAGE);
            pool.deallocate(0, PAGE).expect("live");
        }
    });
    for _ in 0..2 {
        engine.trim().expect("no call fails");
        assert_adds_up(&engine);
        engine.step();
    }
    for thread in taking.into_iter().chain([needing]) {
        thread.join().expect("no thread fails");
    }
    while engine.stats().committed_bytes > 0 {
        engine.step();
        engine.trim().expect("no call fails");
        thread::yield_now();
    }
    drop(engine);
    world.end();
}

/// Two threads take and free the two pages of one range, of which each is parked or slack for the
/// other.
fn two_threads_of_one_range(mode: WorkerMode) {
    let world = World::new(true);
    books(|books| books.in_order = true);
    let options = EngineOptions::new().park_bytes_max(PAGE).worker(mode);
    let engine = world.engine_with(2, options);
    let (pool, stream) = (Arc::new(pool(&engine, 2)), world.stream());
    pool.use_stream(&stream).expect("same device");
    // One chunk of two pages.
    pool.allocate(0, 2 * PAGE).expect("room");
    pool.deallocate(0, 2 * PAGE).expect("live");
    let threads = [0, PAGE].map(|offset| {
        let (pool, stream) = (pool.clone(), stream.clone());
        thread::spawn(move || {
            for _ in 0..2 {
                let address = insist(&pool, offset, PAGE);
                write(&stream, address, PAGE);
                pool.deallocate(offset, PAGE).expect("live");
                assert_adds_up(pool.engine());
            }
        })
    });
    engine.step();
    for thread in threads {
        thread.join().expect("no thread fails");
    }
    drop((pool, stream, engine));
    world.end();
}

/// A model goes while a thread that has its handle takes parked pages and frees them: it gets them
/// until it is told, and all goes with the handle.
fn model_goes_while_its_handle_is_used(mode: WorkerMode) {
    let world = World::new(true);
    books(|books| books.in_order = true);
    let options = SharedPoolOptions::new().engine(
        EngineOptions::new()
            .limit_bytes(4 * PAGE)
            .park_bytes_max(2 * PAGE)
            .worker(mode),
    );
    let shared = Models::with_options(&world.device, options).expect("a limit");
    shared.register_model("model", 2 * PAGE).expect("new");
    let model = shared.model("model").expect("registered");
    let stream = world.stream();
    model.use_stream(&stream).expect("same device");
    model.allocate(0, 2 * PAGE).expect("room");
    model.deallocate(0, 2 * PAGE).expect("live");
    let user = thread::spawn(move || {
        for _ in 0..2 {
            let address = match model.allocate(0, PAGE) {
                Ok(address) => address,
                Err(error) => return assert_eq!(error, VmmError::Closed),
            };
            assert_eq!(address, model.base_address());
            assert_adds_up(model.engine());
            model.deallocate(0, PAGE).expect("live");
        }
    });
    shared.unregister_model("model").expect("registered");
    user.join().expect("no thread fails");
    assert_eq!(shared.stats().committed_bytes, 0);
    drop((stream, shared));
    world.end();
}

/// What a range frees, without the engine's lock, wakes a thread that waits for the budget.
fn freed_while_another_waits(new_driver: bool, mode: WorkerMode) {
    let world = World::new(new_driver);
    let options = EngineOptions::new().park_bytes_max(PAGE).worker(mode);
    let engine = world.engine_with(2, options);
    let (giving, waiting) = (pool(&engine, 2), pool(&engine, 2));
    giving.allocate(0, 2 * PAGE).expect("room");
    giving.deallocate(0, PAGE).expect("live");
    let thread = thread::spawn(move || {
        insist(&waiting, 0, 2 * PAGE);
    });
    giving.deallocate(PAGE, PAGE).expect("live");
    thread.join().expect("no thread fails");
    drop((giving, engine));
    world.end();
}

#[test]
fn parked_pages_are_taken_back_while_others_need_them() {
    explore(|| taken_back_while_given_up(WorkerMode::Thread));
}

#[test]
fn parked_pages_are_taken_back_while_others_need_them_without_a_worker() {
    explore(|| taken_back_while_given_up(WorkerMode::Manual));
}

#[test]
fn two_threads_take_and_free_pages_of_one_chunk() {
    explore(|| two_threads_of_one_range(WorkerMode::Thread));
    explore(|| two_threads_of_one_range(WorkerMode::Manual));
}

#[test]
fn a_model_goes_while_its_handle_takes_parked_pages() {
    explore(|| model_goes_while_its_handle_is_used(WorkerMode::Thread));
    explore(|| model_goes_while_its_handle_is_used(WorkerMode::Manual));
}

#[test]
fn freed_memory_wakes_the_threads_that_wait_for_the_budget() {
    explore(|| freed_while_another_waits(true, WorkerMode::Thread));
    explore(|| freed_while_another_waits(false, WorkerMode::Thread));
    explore(|| freed_while_another_waits(true, WorkerMode::Manual));
}
