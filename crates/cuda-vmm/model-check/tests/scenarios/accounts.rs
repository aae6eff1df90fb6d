//! Several ranges of an account at once, limits that change, and tasks that wait: beside threads
//! that take and free memory of the same ranges.

use crate::books::PAGE;
use crate::explore::explore;
use crate::world::{World, assert_adds_up, limit, settle};
use cuda_vmm::{
    Account, Backed, Engine, EngineOptions, PoolOptions, Quota, VirtualMemoryPool, WorkerMode,
};
use shuttle::sync::atomic::{AtomicBool, Ordering};
use shuttle::sync::{Condvar, Mutex};
use shuttle::thread;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

const CAPACITY: usize = 8 * PAGE;

/// An engine with a limit in pages, each of which is a chunk.
fn engine(world: &World, limit_pages: usize, mode: WorkerMode) -> Engine {
    let options = EngineOptions::new().chunk_bytes_max(0).worker(mode);
    world.engine_with(limit_pages, options)
}

fn account(engine: &Engine, name: &str) -> Account {
    engine.account(name, Quota::new()).expect("a new name")
}

fn range(account: &Account) -> Arc<VirtualMemoryPool> {
    let pool = VirtualMemoryPool::on_account(account, CAPACITY, PAGE, PoolOptions::new());
    Arc::new(pool.expect("no call fails"))
}

fn explore_both(scenario: fn(WorkerMode)) {
    for mode in [WorkerMode::Thread, WorkerMode::Manual] {
        explore(move || scenario(mode));
    }
}

/// Wakes the thread that polls. Not by `unpark`, since the checker ends a `park` for no reason too.
#[derive(Default)]
struct Bell {
    has_rung: Mutex<bool>,
    rings: Condvar,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        *self.has_rung.lock().expect("no panic") = true;
        self.rings.notify_all();
    }
}

/// Polls until the future is ready. Nothing but its waker ends the sleep between two polls.
fn block_on<F: Future>(future: F) -> F::Output {
    let bell = Arc::new(Bell::default());
    let waker = Waker::from(bell.clone());
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
        let mut has_rung = bell.has_rung.lock().expect("no panic");
        while !core::mem::take(&mut *has_rung) {
            has_rung = bell.rings.wait(has_rung).expect("no panic");
        }
    }
}

fn one_of_two(mode: WorkerMode) {
    let world = World::new(true);
    let engine = engine(&world, 5, mode);
    let accounts = ["a", "b"].map(|name| account(&engine, name));
    let pools = accounts
        .each_ref()
        .map(|account| [range(account), range(account)]);
    let races = accounts.into_iter().zip(pools.clone());
    let races: Vec<_> = races
        .map(|(account, [first, second])| {
            thread::spawn(move || {
                // Four of five pages.
                let parts = [(&*first, 0, 2 * PAGE), (&*second, PAGE, 2 * PAGE)];
                let backed = account.try_allocate_many(&parts);
                let is_served = backed.is_ok();
                if let Ok(backed) = backed {
                    backed.keep();
                }
                assert_adds_up(account.engine());
                is_served
            })
        })
        .collect();
    let served = races
        .into_iter()
        .map(|race| race.join().expect("no thread fails"));
    let served: Vec<_> = served.collect();
    assert_eq!(served.iter().filter(|served| **served).count(), 1);
    for ([first, second], served) in pools.iter().zip(served) {
        assert_eq!(first.is_mapped(0, 2 * PAGE), served);
        assert_eq!(second.is_mapped(PAGE, 2 * PAGE), served);
        assert_eq!(
            first.stats().live_bytes + second.stats().live_bytes > 0,
            served
        );
    }
    drop(pools);
    settle(&engine, mode);
    drop(engine);
    world.end();
}

#[test]
fn of_two_accounts_that_want_what_one_can_have_one_is_served() {
    explore_both(one_of_two);
}

fn beside_others(mode: WorkerMode) {
    let world = World::new(true);
    let engine = engine(&world, 8, mode);
    let model = account(&engine, "model");
    let (first, second) = (range(&model), range(&model));
    let stream = world.stream();
    for pool in [&first, &second] {
        pool.use_stream(&stream).expect("same device");
        pool.allocate(0, PAGE / 2).expect("room");
        pool.allocate(4 * PAGE, PAGE).expect("room");
    }
    // Takes and frees in the pages that the parts share, so that what was found changes.
    let others = thread::spawn({
        let (first, second) = (first.clone(), second.clone());
        move || {
            first.deallocate(0, PAGE / 2).expect("live");
            second.deallocate(4 * PAGE, PAGE).expect("live");
            let taken = second.try_allocate(3 * PAGE, PAGE / 2);
            second.deallocate(0, PAGE / 2).expect("live");
            if taken.is_ok() {
                second.deallocate(3 * PAGE, PAGE / 2).expect("live");
            }
            assert_adds_up(first.engine());
        }
    });
    let parts = [
        (&*first, PAGE / 2, PAGE),
        (&*first, 2 * PAGE, 8),
        (&*second, PAGE / 2, PAGE / 2),
        (&*second, 3 * PAGE + PAGE / 2, PAGE / 2),
    ];
    let backed = model.allocate_many(&parts).expect("room for all");
    for (pool, offset, bytes) in parts {
        assert!(pool.is_mapped(offset, bytes));
    }
    drop(backed);
    others.join().expect("no thread fails");
    for (pool, offset, bytes) in parts {
        assert!(!pool.is_mapped(offset, bytes));
    }
    assert_adds_up(&engine);
    drop((first, second, model));
    settle(&engine, mode);
    drop((engine, stream));
    world.end();
}

#[test]
fn parts_are_all_there_though_their_pages_come_and_go() {
    explore_both(beside_others);
}

fn closed_meanwhile(mode: WorkerMode) {
    let world = World::new(true);
    let engine = engine(&world, 8, mode);
    let model = account(&engine, "model");
    let (first, second) = (range(&model), range(&model));
    let closing = thread::spawn({
        let model = model.clone();
        move || model.close()
    });
    let parts = [(&*first, 0, 2 * PAGE), (&*second, 0, PAGE)];
    match model.try_allocate_many(&parts).map(Backed::keep) {
        Ok(()) => {}
        Err(error) => {
            assert_eq!(error, cuda_vmm::VmmError::Closed);
            assert_eq!(first.stats().live_bytes + second.stats().live_bytes, 0);
        }
    }
    closing.join().expect("no thread fails");
    assert_adds_up(&engine);
    drop((first, second, model));
    settle(&engine, mode);
    drop(engine);
    world.end();
}

#[test]
fn an_account_is_closed_while_its_ranges_are_served() {
    explore_both(closed_meanwhile);
}

fn a_task_waits(mode: WorkerMode, free: fn(&Engine, &VirtualMemoryPool)) {
    let world = World::new(true);
    let engine = engine(&world, 2, mode);
    let [holds, wants] = ["holds", "wants"].map(|name| range(&account(&engine, name)));
    holds.allocate(0, 2 * PAGE).expect("room");
    let served = Arc::new(AtomicBool::new(false));
    let waits = thread::spawn({
        let served = served.clone();
        move || {
            block_on(wants.allocate_async(0, 2 * PAGE)).expect("it is served");
            served.store(true, Ordering::SeqCst);
            wants.deallocate(0, 2 * PAGE).expect("live");
        }
    });
    free(&engine, &holds);
    if mode == WorkerMode::Manual {
        while !served.load(Ordering::SeqCst) {
            engine.step();
            thread::yield_now();
        }
    }
    waits.join().expect("no thread fails");
    drop(holds);
    settle(&engine, mode);
    drop(engine);
    world.end();
}

#[test]
fn a_task_is_woken_when_memory_is_freed() {
    explore_both(|mode| {
        a_task_waits(mode, |_, holds| {
            holds.deallocate(0, PAGE).expect("live");
            holds.deallocate(PAGE, PAGE).expect("live");
        });
    });
}

#[test]
fn a_task_is_woken_when_the_limit_rises() {
    explore_both(|mode| {
        a_task_waits(mode, |engine, _| {
            engine.set_limit_bytes(limit(4)).expect("no guarantees");
        });
    });
}

fn a_task_leaves(mode: WorkerMode) {
    let world = World::new(true);
    let engine = engine(&world, 2, mode);
    let [holds, leaves, wants] =
        ["holds", "leaves", "wants"].map(|name| range(&account(&engine, name)));
    holds.allocate(0, 2 * PAGE).expect("room");
    // One stands in line for all there is, and goes; the other wants a page.
    let leaving = thread::spawn(move || {
        let mut allocation = Box::pin(leaves.allocate_async(0, 2 * PAGE));
        let mut context = Context::from_waker(Waker::noop());
        let is_ready = allocation.as_mut().poll(&mut context).is_ready();
        drop(allocation);
        if is_ready {
            leaves.deallocate(0, 2 * PAGE).expect("live");
        }
    });
    let waits = thread::spawn(move || {
        let timeout = std::time::Duration::MAX;
        wants.allocate_timeout(0, PAGE, timeout).expect("served");
    });
    holds.deallocate(0, PAGE).expect("live");
    leaving.join().expect("no thread fails");
    waits.join().expect("no thread fails");
    drop(holds);
    settle(&engine, mode);
    drop(engine);
    world.end();
}

#[test]
fn a_task_that_is_dropped_blocks_no_other() {
    explore_both(a_task_leaves);
}

fn lowered_meanwhile(mode: WorkerMode) {
    let world = World::new(true);
    let engine = engine(&world, 6, mode);
    let [first, second] = ["a", "b"].map(|name| range(&account(&engine, name)));
    first.allocate(0, 3 * PAGE).expect("room");
    let lowering = thread::spawn({
        let engine = engine.clone();
        move || engine.set_limit_bytes(3 * PAGE).expect("no guarantees")
    });
    let taken = second.try_allocate(0, 2 * PAGE);
    lowering.join().expect("no thread fails");
    // What was refused would be owed too.
    second.account().withdraw();
    let over = 3 + 2 * usize::from(taken.is_ok()) - 3;
    let owed = || (first.account().owed_bytes() + second.account().owed_bytes()) / PAGE;
    assert_eq!(owed(), over);
    first.deallocate(0, 3 * PAGE).expect("live");
    assert_eq!(owed(), 0);
    drop((first, second));
    settle(&engine, mode);
    drop(engine);
    world.end();
}

#[test]
fn a_limit_is_lowered_while_memory_is_taken() {
    explore_both(lowered_meanwhile);
}
