//! Two threads use neighbouring bytes of one page.

use crate::books::PAGE;
use crate::explore::explore;
use crate::world::{World, assert_adds_up, pool, settle, write};
use cuda_vmm::WorkerMode;
use shuttle::thread;
use std::sync::Arc;

const HALF: usize = PAGE / 2;

/// Each thread takes its half of the only page, has it written and gives it back, twice. The page
/// is the whole budget, so it must always be there, or come back.
fn halves(new_driver: bool, mode: WorkerMode, named: bool) {
    let world = World::new(new_driver);
    let engine = world.engine(1, mode);
    let pool = Arc::new(pool(&engine, 1));
    let threads = [0, HALF].map(|offset| {
        let (pool, stream) = (pool.clone(), world.stream());
        thread::spawn(move || {
            if named {
                pool.use_stream(&stream).expect("same device");
            }
            for _ in 0..2 {
                let address = pool.allocate(offset, HALF).expect("the page comes back");
                write(&stream, address, HALF);
                assert_adds_up(pool.engine());
                pool.deallocate(offset, HALF).expect("live");
            }
        })
    });
    for thread in threads {
        thread.join().expect("no thread fails");
    }
    settle(&engine, mode);
    drop((pool, engine));
    world.end();
}

#[test]
fn halves_of_a_page_with_named_streams() {
    explore(|| halves(true, WorkerMode::Thread, true));
}

#[test]
fn halves_of_a_page_without_named_streams() {
    explore(|| halves(true, WorkerMode::Thread, false));
}

#[test]
fn halves_of_a_page_without_a_worker() {
    explore(|| halves(true, WorkerMode::Manual, true));
}

#[test]
fn halves_of_a_page_where_only_a_context_synchronise_helps() {
    explore(|| halves(false, WorkerMode::Thread, false));
}

#[test]
fn halves_of_a_page_where_only_a_context_synchronise_helps_and_without_a_worker() {
    explore(|| halves(false, WorkerMode::Manual, false));
}
