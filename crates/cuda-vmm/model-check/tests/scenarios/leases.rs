//! Leases end on other threads, while their owner frees, takes back, or goes.

use crate::books::PAGE;
use crate::explore::explore;
use crate::world::{World, assert_adds_up, pool, write};
use cuda_vmm::{LeaseToken, VmmError, WorkerMode};
use shuttle::sync::Arc;
use shuttle::sync::atomic::{AtomicBool, Ordering};
use shuttle::thread;

/// Released when its user says so: the checker sees the moment, which it would not with an `Arc`.
#[derive(Debug, Clone, Default)]
struct Token(Arc<AtomicBool>);

impl Token {
    fn release(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl LeaseToken for Token {
    fn is_released(&mut self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// A user works on leased pages and lets go, while their owner frees them and drops the pool.
fn owner_goes_while_a_user_works(new_driver: bool, mode: WorkerMode) {
    let world = World::new(new_driver);
    let engine = world.engine(3, mode);
    let (pool, stream) = (pool(&engine, 3), world.stream());
    let address = pool.allocate(0, 3 * PAGE).expect("room");
    let tokens = [Token::default(), Token::default()];
    for (at, token) in tokens.iter().enumerate() {
        pool.lease(at * PAGE, 2 * PAGE, token.clone())
            .expect("live");
    }
    let user = thread::spawn(move || {
        for (at, token) in tokens.into_iter().enumerate() {
            write(&stream, address + (at * PAGE) as u64, 2 * PAGE);
            token.release();
        }
        stream
    });
    pool.deallocate(0, 2 * PAGE).expect("live");
    assert_adds_up(&engine);
    drop(pool);
    assert_adds_up(&engine);
    let stream = user.join().expect("no thread fails");
    if mode == WorkerMode::Manual {
        // No other thread takes the steps that find the tokens released.
        while engine.stats().ranges > 0 {
            engine.step();
            thread::yield_now();
        }
    }
    drop((stream, engine));
    world.end();
}

/// An owner takes back what was leased as soon as it may; a step looks at the same tokens.
fn owner_takes_back(mode: WorkerMode) {
    let world = World::new(true);
    let engine = world.engine(2, mode);
    let (pool, stream) = (pool(&engine, 2), world.stream());
    pool.use_stream(&stream).expect("same device");
    let address = pool.allocate(0, PAGE).expect("room");
    let token = Token::default();
    pool.lease(0, PAGE, token.clone()).expect("live");
    pool.deallocate(0, PAGE).expect("live");
    let user = {
        let stream = stream.clone();
        thread::spawn(move || {
            write(&stream, address, PAGE);
            token.release();
        })
    };
    let stepping = {
        let engine = engine.clone();
        thread::spawn(move || _ = engine.step())
    };
    loop {
        match pool.allocate(0, PAGE) {
            Ok(_) => break,
            Err(VmmError::Leased { .. }) => assert_adds_up(&engine),
            Err(error) => assert!(error.is_retryable(), "{error}"),
        }
        thread::yield_now();
    }
    assert!(!pool.is_leased(0, PAGE));
    write(&stream, address, PAGE);
    for thread in [user, stepping] {
        thread.join().expect("no thread fails");
    }
    drop((pool, stream, engine));
    world.end();
}

#[test]
fn an_owner_goes_while_a_user_works() {
    explore(|| owner_goes_while_a_user_works(true, WorkerMode::Thread));
}

#[test]
fn an_owner_goes_while_a_user_works_without_a_worker() {
    explore(|| owner_goes_while_a_user_works(true, WorkerMode::Manual));
}

#[test]
fn an_owner_goes_while_a_user_works_where_only_a_context_synchronise_helps() {
    explore(|| owner_goes_while_a_user_works(false, WorkerMode::Thread));
}

#[test]
fn an_owner_takes_back_what_was_leased() {
    explore(|| owner_takes_back(WorkerMode::Thread));
}

#[test]
fn an_owner_takes_back_what_was_leased_without_a_worker() {
    explore(|| owner_takes_back(WorkerMode::Manual));
}
