//! A capture is declared while others free memory for which no stream was named, and wait for it.

use crate::books::{Books, PAGE, books};
use crate::explore::explore;
use crate::world::{World, insist, pool, settle, write};
use cuda_vmm::{CaptureGuard, WorkerMode};
use shuttle::thread;

/// What a program does around a capture.
fn capture() {
    let guard = CaptureGuard::new();
    books(Books::begin_capture);
    thread::yield_now();
    books(Books::end_capture);
    drop(guard);
}

/// Memory freed meanwhile comes back, when the capture is over at the latest, and no capture is
/// killed.
fn free_and_wait(new_driver: bool, mode: WorkerMode) {
    let world = World::new(new_driver);
    let engine = world.engine(1, mode);
    let (giving, taking) = (pool(&engine, 1), pool(&engine, 1));
    let stream = world.stream();
    let address = giving.allocate(0, PAGE).expect("room");
    write(&stream, address, PAGE);
    let capturing = thread::spawn(|| {
        capture();
        capture();
    });
    let freeing = thread::spawn(move || giving.deallocate(0, PAGE).expect("live"));
    let address = insist(&taking, 0, PAGE);
    write(&stream, address, PAGE);
    freeing.join().expect("no thread fails");
    capturing.join().expect("no thread fails");
    taking.deallocate(0, PAGE).expect("live");
    settle(&engine, mode);
    drop((taking, stream, engine));
    world.end();
}

/// An engine's last owner goes during a capture: its worker keeps it until everything is back.
fn owner_goes(new_driver: bool) {
    let world = World::new(new_driver);
    let pool = pool(&world.engine(1, WorkerMode::Thread), 1);
    let stream = world.stream();
    let address = pool.allocate(0, PAGE).expect("room");
    write(&stream, address, PAGE);
    let capturing = thread::spawn(capture);
    drop((pool, stream));
    capturing.join().expect("no thread fails");
    world.end();
}

/// A capture ends only when the others are done: an allocation that needs a context synchronise is
/// told that it is for later, and a pool is dropped, without waiting for the capture's end.
fn outlasts_the_waits_of_others(mode: WorkerMode) {
    let world = World::new(false);
    let engine = world.engine(1, mode);
    let (giving, taking) = (pool(&engine, 1), pool(&engine, 1));
    giving.allocate(0, PAGE).expect("room");
    giving.deallocate(0, PAGE).expect("live");
    let others = [
        thread::spawn(move || {
            if let Err(error) = taking.allocate(0, PAGE) {
                assert!(error.is_retryable(), "{error}");
            }
        }),
        thread::spawn(move || drop(giving)),
    ];
    let guard = CaptureGuard::new();
    books(Books::begin_capture);
    for thread in others {
        thread.join().expect("no thread fails");
    }
    books(Books::end_capture);
    drop(guard);
    settle(&engine, mode);
    drop(engine);
    world.end();
}

/// Waiting for the device and captures take turns.
fn synchronise() {
    let world = World::new(true);
    let stream = world.stream();
    let capturing = [(); 2].map(|()| thread::spawn(capture));
    world.device.synchronize().expect("no call fails");
    for thread in capturing {
        thread.join().expect("no thread fails");
    }
    drop(stream);
    world.end();
}

#[test]
fn memory_freed_during_a_capture_comes_back() {
    explore(|| free_and_wait(true, WorkerMode::Thread));
}

#[test]
fn memory_freed_during_a_capture_comes_back_where_only_a_context_synchronise_helps() {
    explore(|| free_and_wait(false, WorkerMode::Thread));
}

#[test]
fn memory_freed_during_a_capture_comes_back_without_a_worker() {
    explore(|| free_and_wait(false, WorkerMode::Manual));
}

#[test]
fn an_engine_whose_owner_goes_during_a_capture_gives_everything_back() {
    explore(|| owner_goes(true));
    explore(|| owner_goes(false));
}

#[test]
fn no_thread_waits_for_the_end_of_a_capture() {
    explore(|| outlasts_the_waits_of_others(WorkerMode::Thread));
    explore(|| outlasts_the_waits_of_others(WorkerMode::Manual));
}

#[test]
fn a_context_synchronise_and_captures_take_turns() {
    explore(synchronise);
}
