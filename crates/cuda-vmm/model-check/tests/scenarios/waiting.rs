//! Models of one pool wait for what others are asked to give back.

use crate::books::PAGE;
use crate::explore::explore;
use crate::models::{ModelOptions, Models};
use crate::world::{World, assert_adds_up, limit, settle, write};
use cuda_vmm::{EngineOptions, Quota, SharedPoolOptions, VirtualMemoryPool, VmmError, WorkerMode};
use shuttle::thread::{self, Thread};
use std::sync::Arc;
use std::task::Wake;
use std::time::Duration;

const FOREVER: Duration = Duration::MAX;

/// Wakes a thread of the checker.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Sleeps until the model owes so many pages; what is missed here is a thread that nothing wakes
/// any more.
fn sleep_until_owed(model: &VirtualMemoryPool, pages: usize) {
    model
        .account()
        .set_owed_waker(Some(Arc::new(Unpark(thread::current())).into()));
    while model.account().owed_bytes() != pages * PAGE {
        thread::park();
    }
    model.account().set_owed_waker(None);
}

/// A pool of so many pages, which keeps what is freed until it is asked for.
fn shared(world: &World, limit_pages: usize, mode: WorkerMode) -> Models {
    let engine = EngineOptions::new()
        .limit_bytes(limit(limit_pages))
        .park_bytes_max(limit_pages * PAGE)
        .chunk_bytes_max(0)
        .worker(mode);
    let options = SharedPoolOptions::new().engine(engine).page_bytes(PAGE);
    Models::with_options(&world.device, options).expect("no call fails")
}

fn register(pool: &Models, model: &str, priority: i32) -> Arc<VirtualMemoryPool> {
    let options = ModelOptions {
        priority,
        ..ModelOptions::new(4 * PAGE)
    };
    pool.register_model_with(model, options)
        .expect("no call fails");
    pool.model(model).expect("registered")
}

/// One model has all, and work runs on it. Another waits, the first is woken, gives back, and the
/// other is served.
fn served_by_the_account_that_owes(mode: WorkerMode) {
    let world = World::new(true);
    let pool = shared(&world, 2, mode);
    let [holds, wants] = ["holds", "wants"].map(|model| register(&pool, model, 0));
    let stream = world.stream();
    holds.use_stream(&stream).expect("same device");
    let address = holds.allocate(0, 2 * PAGE).expect("room");
    write(&stream, address, 2 * PAGE);
    let waits = thread::spawn(move || {
        let outcome = wants.allocate_timeout(0, 2 * PAGE, FOREVER);
        outcome.expect("it is given back");
    });
    sleep_until_owed(&holds, 2);
    holds.deallocate(0, PAGE).expect("live");
    holds.account().give_back().expect("no call fails");
    holds.deallocate(PAGE, PAGE).expect("live");
    assert_adds_up(pool.engine());
    waits.join().expect("it is served");
    drop((holds, stream, pool));
    world.end();
}

/// Two wait for a page each, and one page comes free: it is for the higher priority, whichever
/// thread is awake first.
fn by_priority(mode: WorkerMode) {
    let world = World::new(true);
    let pool = shared(&world, 2, mode);
    let holds = register(&pool, "holds", 0);
    holds.allocate(0, 2 * PAGE).expect("room");
    let [low, high] = [("low", 1), ("high", 2)].map(|(name, priority)| {
        let model = register(&pool, name, priority);
        thread::spawn(move || {
            let outcome = model.allocate_timeout(0, PAGE, FOREVER);
            outcome.expect("it is given back");
        })
    });
    sleep_until_owed(&holds, 2);
    holds.deallocate(0, PAGE).expect("live");
    let late = holds.try_allocate(2 * PAGE, PAGE);
    assert!(late.expect_err("it is for another").is_retryable());
    high.join().expect("it is served first");
    holds.deallocate(PAGE, PAGE).expect("live");
    low.join().expect("it is served then");
    drop((holds, pool));
    world.end();
}

/// What a model has just been guaranteed it gets at once, though others take, wait and give back.
fn guarantees_that_change(mode: WorkerMode) {
    let world = World::new(true);
    let pool = shared(&world, 3, mode);
    let sure = register(&pool, "sure", -1);
    let greedy = ["a", "b"].map(|name| {
        let model = register(&pool, name, 1);
        thread::spawn(move || {
            // Three waits long at most.
            match model.allocate_timeout(0, 2 * PAGE, Duration::from_secs(3)) {
                Ok(_) => model.deallocate(0, 2 * PAGE).expect("live"),
                Err(error) => assert!(error.is_out_of_memory(), "{error}"),
            }
            assert_adds_up(model.engine());
        })
    });
    let mut held = 0;
    for page in 0..2 {
        let quota = Quota::new().guarantee_bytes((page + 1) * PAGE);
        match pool.set_quota("sure", quota) {
            Ok(()) => {
                sure.try_allocate(page * PAGE, PAGE).expect("guaranteed");
                held += 1;
            }
            Err(error) => {
                assert!(
                    matches!(error, VmmError::QuotaUnsatisfiable { .. }),
                    "{error}"
                );
                break;
            }
        }
    }
    // Others may take it now, but what it holds is above its ceiling and owed.
    let nothing = Quota::new().ceiling_bytes(0);
    pool.set_quota("sure", nothing).expect("no guarantee");
    assert_eq!(sure.account().owed_bytes(), held * PAGE);
    (0..held).for_each(|page| sure.deallocate(page * PAGE, PAGE).expect("live"));
    assert_eq!(sure.account().owed_bytes(), 0);
    for thread in greedy {
        thread.join().expect("no thread fails");
    }
    drop((sure, pool));
    world.end();
}

/// The time of a wait is over at any moment, while another gives back: it is served, or nothing is
/// left of it.
fn time_that_runs_out(mode: WorkerMode) {
    let world = World::new(true);
    let pool = shared(&world, 2, mode);
    let [holds, wants] = ["holds", "wants"].map(|model| register(&pool, model, 0));
    holds.allocate(0, 2 * PAGE).expect("room");
    let waits =
        thread::spawn(
            move || match wants.allocate_timeout(0, PAGE, Duration::from_secs(4)) {
                Ok(_) => wants.deallocate(0, PAGE).expect("live"),
                Err(error) => assert!(error.is_retryable(), "{error}"),
            },
        );
    thread::yield_now();
    holds.deallocate(0, 2 * PAGE).expect("live");
    holds.account().give_back().expect("no call fails");
    waits.join().expect("no thread fails");
    // No thread stands in the line any more.
    holds
        .allocate_timeout(2 * PAGE, 2 * PAGE, FOREVER)
        .expect("all is back");
    holds.deallocate(2 * PAGE, 2 * PAGE).expect("live");
    holds.account().give_back().expect("no call fails");
    let engine = pool.engine().clone();
    while engine.stats().committed_bytes > 0 {
        engine.trim().expect("no call fails");
        thread::yield_now();
    }
    settle(&engine, mode);
    drop((holds, pool, engine));
    world.end();
}

/// A model is unregistered while threads wait on it, or are about to: they are told that it is
/// closed, and the threads behind them go on.
fn closed_while_waiting(mode: WorkerMode) {
    let world = World::new(true);
    let pool = shared(&world, 2, mode);
    let [holds, ahead, behind] =
        ["holds", "ahead", "behind"].map(|model| register(&pool, model, 0));
    holds.allocate(0, PAGE).expect("room");
    let first = thread::spawn(move || {
        let outcome = ahead.allocate_timeout(0, 2 * PAGE, FOREVER);
        assert_eq!(outcome, Err(VmmError::Closed));
    });
    let second = thread::spawn(move || {
        let outcome = behind.allocate_timeout(0, PAGE, FOREVER);
        outcome.expect("there is room");
    });
    pool.unregister_model("ahead").expect("registered");
    first.join().expect("it is told");
    second.join().expect("it goes on");
    drop((holds, pool));
    world.end();
}

/// A model waits for memory at addresses that another of its threads takes meanwhile: it is told,
/// and leaves the line to the thread behind it, for which there was room all along.
fn told_while_waiting(mode: WorkerMode) {
    let world = World::new(true);
    let pool = shared(&world, 3, mode);
    let [holds, ahead, behind] =
        ["holds", "ahead", "behind"].map(|model| register(&pool, model, 0));
    let half = PAGE / 2;
    holds.allocate(0, PAGE).expect("room");
    ahead.allocate(0, half).expect("room");
    let first = thread::spawn({
        let ahead = ahead.clone();
        move || {
            let outcome = ahead.allocate_timeout(half, 2 * PAGE, FOREVER);
            let taken = VmmError::AlreadyMapped {
                offset: half,
                bytes: 2 * PAGE,
            };
            assert_eq!(outcome, Err(taken));
        }
    });
    let second = thread::spawn(move || {
        let outcome = behind.allocate_timeout(0, PAGE, FOREVER);
        outcome.expect("there is room");
    });
    ahead.allocate(half, half).expect("the page is there");
    first.join().expect("it is told");
    second.join().expect("it goes on");
    drop((holds, ahead, pool));
    world.end();
}

#[test]
fn a_wait_for_addresses_that_are_taken_lets_those_behind_it_go_on() {
    for mode in [WorkerMode::Thread, WorkerMode::Manual] {
        explore(move || told_while_waiting(mode));
    }
}

#[test]
fn a_thread_that_waits_is_served_by_the_account_that_owes() {
    for mode in [WorkerMode::Thread, WorkerMode::Manual] {
        explore(move || served_by_the_account_that_owes(mode));
    }
}

#[test]
fn the_higher_priority_is_served_first() {
    for mode in [WorkerMode::Thread, WorkerMode::Manual] {
        explore(move || by_priority(mode));
    }
}

#[test]
fn a_guarantee_holds_from_the_moment_it_is_given() {
    for mode in [WorkerMode::Thread, WorkerMode::Manual] {
        explore(move || guarantees_that_change(mode));
    }
}

#[test]
fn a_wait_whose_time_runs_out_leaves_nothing_behind() {
    for mode in [WorkerMode::Thread, WorkerMode::Manual] {
        explore(move || time_that_runs_out(mode));
    }
}

#[test]
fn a_thread_that_waits_on_a_model_that_goes_is_told() {
    for mode in [WorkerMode::Thread, WorkerMode::Manual] {
        explore(move || closed_while_waiting(mode));
    }
}
