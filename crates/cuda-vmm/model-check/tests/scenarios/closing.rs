//! Pools, models and engines end while other threads use what they share.

use crate::books::{PAGE, books, task};
use crate::explore::explore;
use crate::models::Models;
use crate::world::{World, insist, pool, write};
use cuda_vmm::{EngineOptions, SharedPoolOptions, VmmError, WorkerMode};
use shuttle::thread;

/// One thread frees a page, drops its pool and with it another page; the other wants both.
fn drop_while_another_allocates(new_driver: bool, mode: WorkerMode) {
    let world = World::new(new_driver);
    let engine = world.engine(2, mode);
    let (ending, staying) = (pool(&engine, 2), pool(&engine, 2));
    let stream = world.stream();
    let address = ending.allocate(0, 2 * PAGE).expect("room");
    write(&stream, address, 2 * PAGE);
    let thread = thread::spawn(move || {
        ending.deallocate(PAGE, PAGE).expect("live");
        let address = ending.base_address();
        drop(ending);
        let left = books(|books| books.is_reserved(address));
        assert!(!left, "the pool is gone and its addresses are not");
    });
    let address = insist(&staying, 0, 2 * PAGE);
    write(&stream, address, 2 * PAGE);
    thread.join().expect("no thread fails");
    drop((staying, stream, engine));
    world.end();
}

/// A model goes while another thread allocates for it: that gets memory which goes with the model,
/// or is told.
fn unregister_while_another_allocates(mode: WorkerMode) {
    let world = World::new(true);
    let options =
        SharedPoolOptions::new().engine(EngineOptions::new().limit_bytes(8 * PAGE).worker(mode));
    let shared = Models::with_options(&world.device, options).expect("a limit");
    shared.register_model("model", 8 * PAGE).expect("new");
    let threads = [(); 2].map(|()| {
        let shared = shared.clone();
        thread::spawn(move || {
            for _ in 0..2 {
                match shared.allocate_for_model("model", PAGE + 1) {
                    Ok(_) => {}
                    Err(VmmError::Closed | VmmError::ModelNotFound { .. }) => return,
                    Err(error) => assert!(error.is_retryable(), "{error}"),
                }
            }
        })
    });
    shared.unregister_model("model").expect("registered");
    for thread in threads {
        thread.join().expect("no thread fails");
    }
    assert_eq!(shared.stats().committed_bytes, 0);
    drop(shared);
    world.end();
}

/// Two threads register one name; one of them is told, and its range goes away.
fn register_twice() {
    let world = World::new(true);
    let shared = Models::new(&world.device, 2 * PAGE).expect("a limit");
    let threads = [(); 2].map(|()| {
        let shared = shared.clone();
        thread::spawn(move || shared.register_model("model", PAGE).is_ok())
    });
    let registered = threads.map(|thread| thread.join().expect("no thread fails"));
    assert_eq!(
        registered.iter().filter(|registered| **registered).count(),
        1
    );
    let address = shared.allocate_for_model("model", PAGE).expect("room");
    assert_eq!(Some(address), shared.model_base_address("model"));
    drop(shared);
    world.end();
}

/// Owners let go of an engine while its worker takes a step, which may leave the worker as the last
/// owner.
fn owners_go(new_driver: bool) {
    let world = World::new(new_driver);
    let engine = world.engine(2, WorkerMode::Thread);
    let first = pool(&engine, 2);
    first.allocate(0, PAGE).expect("room");
    first.deallocate(0, PAGE).expect("live");
    let second = pool(&engine, 2);
    let thread = thread::spawn(move || {
        second.allocate(0, PAGE).expect("room");
        drop(second);
    });
    drop((first, engine));
    thread.join().expect("no thread fails");
    world.end();
}

/// The thread that ends a pool unmaps all that it has. The worker is woken for it, and calls the
/// driver for nothing of it.
fn one_unmaps(new_driver: bool) {
    let world = World::new(new_driver);
    let engine = world.engine(4, WorkerMode::Thread);
    let (ending, stream) = (pool(&engine, 4), world.stream());
    for page in 0..4 {
        ending.allocate(page * PAGE, PAGE).expect("room");
    }
    write(&stream, ending.base_address(), 4 * PAGE);
    drop(ending);
    let unmapping = books(|books| books.unmapping.clone());
    assert_eq!(unmapping, [task()].into());
    drop((stream, engine));
    world.end();
}

/// A pool and the last pin of its memory go at the same time. The thread that comes second gives
/// all back.
fn pool_and_pin_go(new_driver: bool, mode: WorkerMode) {
    let world = World::new(new_driver);
    let options = EngineOptions::new().park_bytes_max(2 * PAGE).worker(mode);
    let engine = world.engine_with(2, options);
    let (pool, stream) = (pool(&engine, 2), world.stream());
    let address = pool.allocate(0, 2 * PAGE).expect("room");
    write(&stream, address, 2 * PAGE);
    let pin = pool.pin_for_graph(0, PAGE).expect("live");
    pool.deallocate(PAGE, PAGE).expect("live");
    let thread = thread::spawn(move || drop(pin));
    drop(pool);
    thread.join().expect("no thread fails");
    let left = books(|books| books.is_reserved(address));
    assert!(!left, "both are gone and the addresses are not");
    assert_eq!(engine.stats().committed_bytes, 0);
    drop((stream, engine));
    world.end();
}

/// The same, with nothing left for the device or the driver to do but what the pin keeps. So the
/// pin may go at the very moment at which the closing has looked for the last time, while other
/// threads still leave the range to it.
fn pool_and_pin_of_parked_memory_go() {
    let world = World::new(true);
    let options = EngineOptions::new().park_bytes_max(PAGE);
    let engine = world.engine_with(1, options.worker(WorkerMode::Manual));
    let pool = pool(&engine, 1);
    let address = pool.allocate(0, PAGE).expect("room");
    let pin = pool.pin_for_graph(0, PAGE).expect("live");
    pool.deallocate(0, PAGE).expect("live");
    while engine.stats().parts.parked_bytes == 0 {
        engine.step();
        thread::yield_now();
    }
    let thread = thread::spawn(move || drop(pin));
    drop(pool);
    thread.join().expect("no thread fails");
    let left = books(|books| books.is_reserved(address));
    assert!(!left, "both are gone and the addresses are not");
    drop(engine);
    world.end();
}

#[test]
fn a_pool_ends_while_its_last_pin_does() {
    explore(pool_and_pin_of_parked_memory_go);
    explore(|| pool_and_pin_go(true, WorkerMode::Thread));
    explore(|| pool_and_pin_go(true, WorkerMode::Manual));
    explore(|| pool_and_pin_go(false, WorkerMode::Manual));
}

#[test]
fn a_pool_that_ends_is_unmapped_by_one_thread() {
    explore(|| one_unmaps(true));
    explore(|| one_unmaps(false));
}

#[test]
fn a_pool_ends_while_another_allocates() {
    explore(|| drop_while_another_allocates(true, WorkerMode::Thread));
}

#[test]
fn a_pool_ends_while_another_allocates_without_a_worker() {
    explore(|| drop_while_another_allocates(true, WorkerMode::Manual));
}

#[test]
fn a_pool_ends_while_another_allocates_where_only_a_context_synchronise_helps() {
    explore(|| drop_while_another_allocates(false, WorkerMode::Thread));
}

#[test]
fn a_model_goes_while_another_thread_allocates_for_it() {
    explore(|| unregister_while_another_allocates(WorkerMode::Thread));
}

#[test]
fn a_model_goes_while_another_thread_allocates_for_it_without_a_worker() {
    explore(|| unregister_while_another_allocates(WorkerMode::Manual));
}

#[test]
fn one_of_two_threads_registers_a_model() {
    explore(register_twice);
}

#[test]
fn an_engine_ends_with_its_last_owner_even_if_that_is_its_worker() {
    explore(|| owners_go(true));
    explore(|| owners_go(false));
}
