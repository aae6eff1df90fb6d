//! Memory is taken back, or a stream is named, while the device still works on it.

use crate::books::{PAGE, books};
use crate::explore::explore;
use crate::world::{World, assert_adds_up, insist, pool, settle, write};
use cuda_vmm::{VirtualMemoryPool, VmmError, WorkerMode};
use shuttle::thread;
use std::sync::Arc;

/// The only page, once no other thread has it.
fn take(pool: &VirtualMemoryPool) -> u64 {
    loop {
        match pool.allocate(0, PAGE) {
            Ok(address) => return address,
            Err(error) => assert!(
                error.is_retryable() || matches!(error, VmmError::AlreadyMapped { .. }),
                "{error}"
            ),
        }
        thread::yield_now();
    }
}

/// Two threads, each with a stream of its own, hand the only page to and fro. What one launches on
/// it must come after what the other did; the second stream is named only when the first may
/// already have taken the page back.
fn one_page_two_streams(mode: WorkerMode) {
    let world = World::new(true);
    books(|books| books.in_order = true);
    let engine = world.engine(1, mode);
    let pool = Arc::new(pool(&engine, 1));
    let threads = [(); 2].map(|()| {
        let (pool, stream) = (pool.clone(), world.stream());
        thread::spawn(move || {
            pool.use_stream(&stream).expect("same device");
            for _ in 0..2 {
                let address = take(&pool);
                write(&stream, address, PAGE);
                assert_adds_up(pool.engine());
                pool.deallocate(0, PAGE).expect("live");
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

/// A page is taken back again and again on one stream, while another thread needs the budget that
/// it takes.
fn against_the_budget(mode: WorkerMode) {
    let world = World::new(true);
    books(|books| books.in_order = true);
    let engine = world.engine(1, mode);
    let (own, other) = (pool(&engine, 1), pool(&engine, 1));
    let stream = world.stream();
    own.use_stream(&stream).expect("same device");
    let taking = thread::spawn(move || {
        insist(&other, 0, PAGE);
        other.deallocate(0, PAGE).expect("live");
    });
    for _ in 0..2 {
        let address = insist(&own, 0, PAGE);
        write(&stream, address, PAGE);
        own.deallocate(0, PAGE).expect("live");
    }
    taking.join().expect("no thread fails");
    settle(&engine, mode);
    drop((own, stream, engine));
    world.end();
}

/// Threads with a stream each work on the only page in turn, and end: the next free waits for what
/// they leave queued, on any thread, and their streams go.
fn streams_come_and_go(forgets: bool, mode: WorkerMode) {
    let world = World::new(true);
    books(|books| books.in_order = true);
    let engine = world.engine(1, mode);
    let pool = Arc::new(pool(&engine, 1));
    let threads = [(); 3].map(|()| {
        let (pool, stream) = (pool.clone(), world.stream());
        thread::spawn(move || {
            pool.use_stream(&stream).expect("same device");
            let address = take(&pool);
            write(&stream, address, PAGE);
            if forgets {
                pool.forget_stream(&stream).expect("named");
                pool.deallocate(0, PAGE).expect("live");
            } else {
                pool.deallocate(0, PAGE).expect("live");
                drop(stream);
            }
            assert_adds_up(pool.engine());
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
fn streams_that_come_and_go_leave_no_work_behind() {
    for forgets in [true, false] {
        explore(move || streams_come_and_go(forgets, WorkerMode::Thread));
        explore(move || streams_come_and_go(forgets, WorkerMode::Manual));
    }
}

#[test]
fn two_streams_hand_a_page_to_and_fro() {
    explore(|| one_page_two_streams(WorkerMode::Thread));
    explore(|| one_page_two_streams(WorkerMode::Manual));
}

#[test]
fn what_is_taken_back_at_once_is_not_kept_from_others_for_good() {
    explore(|| against_the_budget(WorkerMode::Thread));
    explore(|| against_the_budget(WorkerMode::Manual));
}
