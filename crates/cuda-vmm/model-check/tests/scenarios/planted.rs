//! Bugs that are there on purpose: the checker and the books must find them.

use crate::books::PAGE;
use crate::explore::explore;
use crate::world::{World, pool, write};
use cuda_vmm::{Access, Mapping, PhysicalMemory, Reservation, WorkerMode};
use shuttle::sync::{Condvar, Mutex};
use shuttle::thread;
use std::sync::Arc;

#[test]
#[should_panic(expected = "was unmapped under running work")]
fn a_mapping_that_is_dropped_under_running_work_is_found() {
    explore(|| {
        let world = World::new(true);
        let device = &world.device;
        let reservation = Arc::new(Reservation::new(device, PAGE).expect("no call fails"));
        let memory = Arc::new(PhysicalMemory::new(device, PAGE).expect("no call fails"));
        let access = [(device.clone(), Access::ReadWrite)];
        let mapping = Mapping::new(&reservation, 0, &memory, &access).expect("no call fails");
        let stream = world.stream();
        write(&stream, mapping.address(), PAGE);
        drop((mapping, memory, reservation, stream));
        world.end();
    });
}

#[test]
#[should_panic(expected = "was unmapped under running work")]
fn work_on_a_stream_that_was_not_named_is_found() {
    explore(|| {
        let world = World::new(true);
        let engine = world.engine(1, WorkerMode::Thread);
        let pool = pool(&engine, 1);
        let (named, used) = (world.stream(), world.stream());
        pool.use_stream(&named).expect("same device");
        let address = pool.allocate(0, PAGE).expect("room");
        write(&used, address, PAGE);
        drop((pool, engine, named, used));
        world.end();
    });
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_wake_up_that_comes_before_the_wait_is_found() {
    explore(|| {
        let shared = Arc::new((Mutex::new(false), Condvar::new()));
        let waiting = thread::spawn({
            let shared = shared.clone();
            move || {
                // The lock is let go between the question and the wait.
                let ready = *shared.0.lock().expect("not poisoned");
                if !ready {
                    let guard = shared.0.lock().expect("not poisoned");
                    drop(shared.1.wait(guard).expect("not poisoned"));
                }
            }
        });
        *shared.0.lock().expect("not poisoned") = true;
        shared.1.notify_one();
        waiting.join().expect("no thread fails");
    });
}
