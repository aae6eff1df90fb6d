//! What promises not to wait does not wait, whatever other threads and the device are in the middle
//! of.

use crate::books::{Books, PAGE, books};
use crate::explore::explore;
use crate::world::{World, pause, pool, resume, write};
use cuda_vmm::WorkerMode;
use cuda_vmm::sys::DriverFunction;
use shuttle::thread;
use std::sync::Arc;

/// All other threads stand still inside this call, and the device finishes nothing, until the try
/// has been answered.
fn answered_at_once(mode: WorkerMode, held: DriverFunction, new_driver: bool) {
    let world = World::new(new_driver);
    let engine = world.engine(2, mode);
    let pool = Arc::new(pool(&engine, 4));
    let stream = world.stream();
    let address = pool.allocate(0, PAGE).expect("room");
    write(&stream, address, PAGE);
    pause();
    books(|books| books.hold(held));
    let others = [PAGE, 2 * PAGE].map(|offset| {
        let pool = pool.clone();
        thread::spawn(move || {
            if pool.allocate(offset, PAGE).is_ok() {
                pool.deallocate(offset, PAGE).expect("live");
            }
        })
    });
    pool.deallocate(0, PAGE).expect("live");
    for offset in [0, PAGE / 2, PAGE, 3 * PAGE] {
        match pool.try_allocate(offset, PAGE / 2) {
            Ok(_) => pool.deallocate(offset, PAGE / 2).expect("live"),
            Err(error) => {
                let taken = matches!(error, cuda_vmm::VmmError::AlreadyMapped { .. });
                assert!(taken || error.is_retryable(), "{error}");
            }
        }
    }
    books(Books::release);
    resume();
    for thread in others {
        thread.join().expect("no thread fails");
    }
    drop((pool, stream, engine));
    world.end();
}

#[test]
fn a_try_is_answered_while_others_are_inside_the_driver() {
    use DriverFunction::{cuCtxRecordEvent, cuMemMap, cuMemUnmap};
    for held in [cuMemMap, cuMemUnmap, cuCtxRecordEvent] {
        explore(move || answered_at_once(WorkerMode::Thread, held, true));
    }
}

#[test]
fn a_try_is_answered_while_the_worker_synchronises() {
    let held = DriverFunction::cuCtxSynchronize;
    explore(move || answered_at_once(WorkerMode::Thread, held, false));
}

#[test]
fn a_try_is_answered_without_a_worker() {
    let held = DriverFunction::cuMemMap;
    explore(move || answered_at_once(WorkerMode::Manual, held, true));
}
