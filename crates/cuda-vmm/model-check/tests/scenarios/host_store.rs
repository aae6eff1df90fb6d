//! Threads that share a store of pinned host memory.

use crate::books::books;
use crate::explore::explore;
use crate::world::World;
use cuda_vmm::sys::{CUDA_ERROR_OUT_OF_MEMORY, DriverFunction};
use cuda_vmm::{HostStore, HostStoreOptions, VmmError};
use shuttle::thread;

/// The unit of a store's sizes.
const UNIT: usize = 2 << 20;

/// A store of this many units, in pieces of two.
fn store(world: &World, limit_units: usize) -> HostStore {
    let options = HostStoreOptions::new().piece_bytes(2 * UNIT).threads(1);
    let store = HostStore::with_options(&world.device, limit_units * UNIT, options);
    books(|books| books.host_limit_bytes = Some(limit_units * UNIT));
    store.expect("this process")
}

/// The limit is what all threads need. So each is served, though a piece is more than it needs.
fn all_are_served() {
    let world = World::new(true);
    let store = store(&world, 4);
    let threads = [1, 1, 2].map(|units| {
        let store = store.clone();
        thread::spawn(move || {
            let mut bytes = store.reserve(units * UNIT).expect("room for all");
            bytes.write(0, &[units as u8]).expect("within");
            let mut found = [0];
            bytes.read(0, &mut found).expect("within");
            assert_eq!(found, [units as u8]);
        })
    });
    for thread in threads {
        thread.join().expect("no thread fails");
    }
    assert_eq!(store.stats().in_use_bytes, 0);
    drop(store);
    world.end();
}

/// A thread whose piece cannot be made leaves room for those that wait for it.
fn one_fails() {
    let world = World::new(true);
    let store = store(&world, 2);
    let register = DriverFunction::cuMemHostRegister;
    books(|books| books.fail(register, 0, CUDA_ERROR_OUT_OF_MEMORY));
    let threads = [(); 2].map(|()| {
        let store = store.clone();
        thread::spawn(move || match store.reserve(UNIT) {
            Ok(_) => 1,
            Err(error @ VmmError::Driver(_)) => {
                assert!(error.driver_code().is_some());
                0
            }
            Err(error) => panic!("{error}"),
        })
    });
    let served: usize = threads
        .map(|thread| thread.join().expect("no panic"))
        .into_iter()
        .sum();
    assert_eq!(served, 1);
    assert_eq!(store.stats().in_use_bytes, 0);
    drop(store);
    world.end();
}

/// A limit that is lowered, and a trim, while others reserve and give back.
fn lowered(trims: bool) {
    let world = World::new(true);
    let store = store(&world, 4);
    let held = [2, 1].map(|units| store.reserve(units * UNIT).expect("room"));
    let giving = held.map(|bytes| thread::spawn(move || drop(bytes)));
    let reserving = thread::spawn({
        let store = store.clone();
        move || match store.reserve(UNIT) {
            Ok(bytes) => drop(bytes),
            Err(error) => assert!(matches!(error, VmmError::HostStoreFull { .. }), "{error}"),
        }
    });
    if trims {
        store.trim().expect("no call fails");
    }
    store.set_limit_bytes(2 * UNIT).expect("this process");
    for thread in giving.into_iter().chain([reserving]) {
        thread.join().expect("no thread fails");
    }
    // The last thread that gave something back has seen to it.
    let stats = store.stats();
    assert!(stats.registered_bytes <= 2 * UNIT, "{stats}");
    drop(store);
    world.end();
}

/// A thread that waits for its turn takes what comes free, though the turn lasts.
fn served_meanwhile() {
    let world = World::new(true);
    let store = store(&world, 6);
    let held = store.reserve(2 * UNIT).expect("room");
    let register = DriverFunction::cuMemHostRegister;
    books(|books| books.hold(register));
    let reserve = || {
        let store = store.clone();
        thread::spawn(move || drop(store.reserve(2 * UNIT).expect("room")))
    };
    let making = reserve();
    while store.stats().in_use_bytes < 4 * UNIT {
        thread::yield_now();
    }
    let waiting = reserve();
    while store.stats().in_use_bytes < 6 * UNIT {
        thread::yield_now();
    }
    drop(held);
    waiting.join().expect("no thread fails");
    books(|books| books.release());
    making.join().expect("no thread fails");
    drop(store);
    world.end();
}

#[test]
fn threads_that_need_the_whole_limit_together_are_all_served() {
    explore(all_are_served);
}

#[test]
fn a_piece_that_cannot_be_made_is_another_threads_to_make() {
    explore(one_fails);
}

#[test]
fn a_lowered_limit_is_kept_whoever_comes_last() {
    explore(|| lowered(false));
}

#[test]
fn a_lowered_limit_and_a_trim_leave_no_more_than_the_limit() {
    explore(|| lowered(true));
}

#[test]
fn a_thread_that_waits_for_its_turn_takes_what_comes_free() {
    explore(served_meanwhile);
}
