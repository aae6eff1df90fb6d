//! Asking without taking, and wanting no more.

use super::{Counts, account, asked, blocks, engine, range};
use crate::common::{PAGE, manual};
use cuda_vmm::sim::Fault;
use cuda_vmm::sys::{CUDA_ERROR_OPERATING_SYSTEM, DriverFunction};
use cuda_vmm::{Engine, Quota, Stream};
use std::sync::Arc;
use std::task::{Wake, Waker};

#[test]
fn what_is_available_is_what_an_allocation_gets() {
    let (_simulated, engine) = engine(manual().park_bytes_max(8 * PAGE));
    let sure = account(&engine, "sure", Quota::new().guarantee_bytes(2 * PAGE));
    let capped = account(&engine, "capped", Quota::new().ceiling_bytes(3 * PAGE));
    let high = account(&engine, "high", Quota::new().priority(1));
    let accounts = [&sure, &capped, &high];
    let available = || accounts.map(|account| account.available_bytes() / PAGE);
    assert_eq!(available(), [8, 3, 6]);
    let pools = accounts.map(range);
    pools[1].allocate(0, 3 * PAGE).expect("room");
    assert_eq!(available(), [5, 0, 3]);
    // What is parked counts for all, and what retires for none.
    let stream = Stream::new(engine.device()).expect("a stream");
    pools[1].use_stream(&stream).expect("same device");
    pools[1].deallocate(0, 2 * PAGE).expect("live");
    assert_eq!(available(), [5, 0, 3]);
    engine.step();
    assert_eq!(available(), [7, 2, 5]);
    // Exactly that can be had.
    assert_eq!(asked(pools[2].try_allocate(0, 6 * PAGE)), 6);
    pools[2].try_allocate(0, 5 * PAGE).expect("available");
    assert_eq!(available(), [2, 0, 0]);
}

#[test]
fn cached_memory_that_the_driver_refuses_to_take_is_not_available() {
    let (simulated, engine) = engine(manual().cache_bytes_max(2 * PAGE));
    let model = account(&engine, "model", Quota::new());
    let pool = range(&model);
    pool.allocate(0, 2 * PAGE).expect("room");
    pool.deallocate(0, 2 * PAGE).expect("live");
    while engine.stats().parts.cached_bytes < 2 * PAGE {
        engine.step();
    }
    assert_eq!(model.available_bytes(), 8 * PAGE);
    let code = CUDA_ERROR_OPERATING_SYSTEM;
    let refused = Fault::always(DriverFunction::cuMemRelease, code);
    simulated.simulator.inject(refused);
    engine.trim().expect_err("refused");
    assert_eq!(engine.stats().parts.quarantined_bytes, 2 * PAGE);
    assert_eq!(model.available_bytes(), 6 * PAGE);
    assert_eq!(asked(pool.try_allocate(0, 7 * PAGE)), 7);
    pool.try_allocate(0, 6 * PAGE).expect("available");
    simulated.simulator.clear_faults();
    engine.trim().expect("taken");
    assert_eq!(model.available_bytes(), 2 * PAGE);
}

#[test]
fn a_refusal_presses_others_until_it_is_withdrawn() {
    let (_simulated, engine) = engine(manual());
    let [holder, asks] = ["holder", "asks"].map(|name| account(&engine, name, Quota::new()));
    let (held, wanted) = (range(&holder), range(&asks));
    held.allocate(0, 8 * PAGE).expect("room");
    assert_eq!(asks.withdraw(), 0, "nothing was asked for");
    assert_eq!(asked(wanted.try_allocate(0, 3 * PAGE)), 3);
    assert_eq!(holder.owed_bytes(), 3 * PAGE);
    assert_eq!(asks.withdraw(), 3 * PAGE);
    assert_eq!(holder.owed_bytes(), 0);
    assert_eq!(asks.withdraw(), 0);
    // A guard withdraws when the last of them goes.
    let (first, second) = (asks.demand(), asks.demand());
    assert_eq!(asked(blocks(&asks, 4).try_back([0])), 2);
    assert_eq!(holder.owed_bytes(), 2 * PAGE);
    drop(first);
    assert_eq!(holder.owed_bytes(), 2 * PAGE);
    drop(second);
    assert_eq!(holder.owed_bytes(), 0);
}

/// Asks the engine for its numbers when it is dropped, which needs the engine's lock.
struct AsksInDrop(Engine);

impl Wake for AsksInDrop {
    fn wake(self: Arc<Self>) {}
}

impl Drop for AsksInDrop {
    fn drop(&mut self) {
        self.0.stats();
    }
}

#[test]
fn wakers_go_with_no_lock_held_also_if_a_range_is_kept() {
    let (_simulated, engine) = engine(manual());
    let model = account(&engine, "model", Quota::new());
    let pool = range(&model);
    pool.allocate(0, PAGE).expect("room");
    let token = Arc::new(());
    pool.lease(0, PAGE, token.clone()).expect("live");
    model.set_owed_waker(Some(Waker::from(Arc::new(AsksInDrop(engine.clone())))));
    model.set_memory_waker(Some(Waker::from(Arc::new(AsksInDrop(engine.clone())))));
    // The lease keeps the range, beyond its pool and its account.
    drop((pool, model));
    assert_eq!(engine.stats().parts.leased_bytes, PAGE);
    drop(token);
    while engine.stats().ranges > 0 {
        engine.step();
    }
}

#[test]
fn a_caller_that_was_refused_is_woken_when_memory_has_come() {
    let (_simulated, engine) = engine(manual());
    let [holder, asks] = ["holder", "asks"].map(|name| account(&engine, name, Quota::new()));
    let (held, wanted) = (range(&holder), range(&asks));
    held.allocate(0, 8 * PAGE).expect("room");
    let counts = Arc::new(Counts::default());
    asks.set_memory_waker(Some(Waker::from(counts.clone())));
    assert_eq!(asked(wanted.try_allocate(0, 2 * PAGE)), 2);
    held.deallocate(0, PAGE).expect("live");
    engine.step();
    assert_eq!(counts.woken(), 0, "one page is not enough");
    held.deallocate(PAGE, PAGE).expect("live");
    engine.step();
    assert!(counts.woken() > 0);
    wanted.try_allocate(0, 2 * PAGE).expect("it has come");
    let woken = counts.woken();
    held.deallocate(2 * PAGE, PAGE).expect("live");
    engine.step();
    assert_eq!(counts.woken(), woken, "it wants nothing any more");
    assert_eq!(asked(wanted.try_allocate(2 * PAGE, 2 * PAGE)), 2);
    asks.withdraw();
    held.deallocate(3 * PAGE, PAGE).expect("live");
    engine.step();
    assert_eq!(counts.woken(), woken, "it was withdrawn");
    asks.set_memory_waker(None);
    assert_eq!(Arc::strong_count(&counts), 1);
}
