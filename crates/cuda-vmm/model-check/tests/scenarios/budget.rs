//! Ranges compete for a budget of two pages.

use crate::books::PAGE;
use crate::explore::explore;
use crate::world::{World, assert_adds_up, insist, pool, settle, write};
use cuda_vmm::WorkerMode;
use shuttle::thread;

/// What one range has freed, and the device may still use, is enough for another: that waits and
/// gets it, whatever other thread looks after the engine meanwhile.
fn waits_for_what_retires(new_driver: bool, mode: WorkerMode) {
    let world = World::new(new_driver);
    let engine = world.engine(2, mode);
    let (giving, taking) = (pool(&engine, 2), pool(&engine, 2));
    let stream = world.stream();
    let address = giving.allocate(0, 2 * PAGE).expect("room");
    write(&stream, address, 2 * PAGE);
    giving.deallocate(0, 2 * PAGE).expect("live");
    let looking = thread::spawn({
        let engine = engine.clone();
        move || {
            engine.trim().expect("no call fails");
            assert_adds_up(&engine);
            engine.step();
        }
    });
    let address = taking.allocate(0, 2 * PAGE).expect("it comes back");
    write(&stream, address, 2 * PAGE);
    looking.join().expect("no thread fails");
    drop((giving, taking, stream, engine));
    world.end();
}

/// Each thread wants the whole budget, twice. Refusals say that it can be had later, and it can.
fn compete(new_driver: bool, mode: WorkerMode) {
    let world = World::new(new_driver);
    let engine = world.engine(2, mode);
    let threads = [(); 2].map(|()| {
        let (pool, stream) = (pool(&engine, 2), world.stream());
        thread::spawn(move || {
            pool.use_stream(&stream).expect("same device");
            for _ in 0..2 {
                let address = insist(&pool, 0, 2 * PAGE);
                write(&stream, address, 2 * PAGE);
                pool.deallocate(0, 2 * PAGE).expect("live");
            }
        })
    });
    for thread in threads {
        thread.join().expect("no thread fails");
    }
    settle(&engine, mode);
    drop(engine);
    world.end();
}

#[test]
fn an_allocation_waits_for_what_retires() {
    explore(|| waits_for_what_retires(true, WorkerMode::Thread));
}

#[test]
fn an_allocation_waits_for_what_retires_without_a_worker() {
    explore(|| waits_for_what_retires(true, WorkerMode::Manual));
}

#[test]
fn an_allocation_waits_for_a_context_synchronise() {
    explore(|| waits_for_what_retires(false, WorkerMode::Thread));
}

#[test]
fn an_allocation_synchronises_without_a_worker() {
    explore(|| waits_for_what_retires(false, WorkerMode::Manual));
}

#[test]
fn ranges_that_each_want_the_whole_budget_all_get_it() {
    explore(|| compete(true, WorkerMode::Thread));
}

#[test]
fn ranges_that_each_want_the_whole_budget_all_get_it_without_a_worker() {
    explore(|| compete(true, WorkerMode::Manual));
}
