//! Asking without taking, and wanting no more.

use super::{Counts, account, asked, blocks, engine, range};
use crate::common::{PAGE, manual};
use cuda_vmm::sim::Fault;
use cuda_vmm::sys::{CUDA_ERROR_OPERATING_SYSTEM, DriverFunction};
use cuda_vmm::{Engine, PoolOptions, Quota, Stream, VirtualMemoryPool};
use std::sync::Arc;
use std::task::{Wake, Waker};
use std::time::Duration;

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
    let table = blocks(&asks, 4);
    assert_eq!(asked(table.try_back([0])), 2);
    assert_eq!(holder.owed_bytes(), 2 * PAGE);
    drop(first);
    assert_eq!(holder.owed_bytes(), 2 * PAGE);
    drop(second);
    assert_eq!(holder.owed_bytes(), 0);
}

#[test]
fn nothing_is_given_up_for_an_allocation_that_it_could_not_serve() {
    let (_simulated, engine) = engine(manual().park_bytes_max(8 * PAGE));
    let [holder, asks] = ["holder", "asks"].map(|name| account(&engine, name, Quota::new()));
    let (held, wanted) = (range(&holder), range(&asks));
    held.allocate(0, 8 * PAGE).expect("room");
    held.deallocate(0, 3 * PAGE).expect("live");
    engine.step();
    assert_eq!(asked(wanted.try_allocate(0, 4 * PAGE)), 4);
    assert_eq!(asked(wanted.allocate(0, 4 * PAGE)), 4);
    assert_eq!(held.stats().parts.parked_bytes, 3 * PAGE);
    wanted.try_allocate(0, 2 * PAGE).expect("two are given up");
    assert_eq!(held.stats().parts.parked_bytes, PAGE);
}

#[test]
fn what_the_driver_keeps_from_an_allocation_others_owe() {
    let (simulated, engine) = engine(manual());
    let [holder, asks] = ["holder", "asks"].map(|name| account(&engine, name, Quota::new()));
    let (held, wanted) = (range(&holder), range(&asks));
    held.allocate(0, 8 * PAGE).expect("room");
    held.deallocate(0, 2 * PAGE).expect("live");
    let code = CUDA_ERROR_OPERATING_SYSTEM;
    let refused = Fault::always(DriverFunction::cuMemUnmap, code);
    simulated.simulator.inject(refused);
    engine.step();
    assert_eq!(held.stats().parts.quarantined_bytes, 2 * PAGE);
    // As much as the driver may give back yet.
    assert_eq!(asked(wanted.try_allocate(0, 2 * PAGE)), 2);
    assert_eq!(holder.owed_bytes(), 2 * PAGE);
    simulated.simulator.clear_faults();
    wanted.try_allocate(0, 2 * PAGE).expect("given back");
    assert_eq!(holder.owed_bytes(), 0);
}

#[test]
fn what_a_range_was_refused_is_wanted_while_other_ranges_are_served() {
    let (_simulated, engine) = engine(manual());
    let holder = account(&engine, "holder", Quota::new().priority(-1));
    let asks = account(&engine, "asks", Quota::new());
    let ahead = PoolOptions::new().ahead_bytes_max(PAGE);
    let ahead = VirtualMemoryPool::on_account(&asks, 64 * PAGE, PAGE, ahead).expect("addresses");
    let (held, wanted, other) = (range(&holder), range(&asks), range(&asks));
    held.allocate(0, 5 * PAGE).expect("room");
    assert_eq!(asked(wanted.try_allocate(0, 4 * PAGE)), 4);
    let owed_pages = || holder.owed_bytes() / PAGE;
    assert_eq!(owed_pages(), 1);
    other.allocate(0, PAGE).expect("room");
    assert_eq!(owed_pages(), 2);
    ahead.allocate(0, PAGE).expect("room");
    assert_eq!(owed_pages(), 3);
    held.deallocate(0, PAGE).expect("live");
    engine.step();
    assert_eq!(ahead.stats().parts.ahead_bytes, PAGE);
    assert_eq!(owed_pages(), 2, "memory made ahead counts as free");
    // Each range has its own want.
    let refuse_other = || assert_eq!(asked(other.try_allocate(8 * PAGE, 3 * PAGE)), 3);
    refuse_other();
    assert_eq!(owed_pages(), 4, "all that there is");
    held.deallocate(PAGE, PAGE).expect("live");
    other.allocate(PAGE, 1).expect("room");
    assert_eq!(owed_pages(), 2, "of one");
    other.allocate(PAGE + 1, 1).expect("no page is missing");
    wanted.allocate(0, PAGE).expect("given up");
    assert_eq!(owed_pages(), 0);
    refuse_other();
    other.allocate(PAGE + 2, 1).expect("no page is missing");
    assert_eq!(owed_pages(), 2, "it has got no memory");
    held.deallocate(2 * PAGE, 2 * PAGE).expect("live");
    let parts = [(&wanted, PAGE, PAGE), (&other, 2 * PAGE, PAGE)];
    asks.try_allocate_many(&parts).expect("room").keep();
    assert_eq!(owed_pages(), 0, "both have got memory");
}

#[test]
fn what_a_closed_range_was_refused_its_account_wants_until_another_gets_memory() {
    let (_simulated, engine) = engine(manual());
    let [holder, asks] = ["holder", "asks"].map(|name| account(&engine, name, Quota::new()));
    let held = range(&holder);
    held.allocate(0, 6 * PAGE).expect("room");
    let owed_pages = || holder.owed_bytes() / PAGE;
    for _ in 0..2 {
        assert_eq!(asked(range(&asks).try_allocate(0, 4 * PAGE)), 4);
        assert_eq!(owed_pages(), 2, "the last one only");
    }
    range(&asks).allocate(0, PAGE).expect("room");
    assert_eq!(owed_pages(), 0);
    assert_eq!(asked(range(&asks).try_allocate(0, 4 * PAGE)), 4);
    asks.close();
    assert_eq!(owed_pages(), 0);
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

#[test]
fn a_caller_is_woken_also_for_memory_that_no_other_can_give_back() {
    let (_simulated, engine) = engine(manual());
    let asks = account(&engine, "asks", Quota::new().ceiling_bytes(6 * PAGE));
    let sure = account(&engine, "sure", Quota::new().guarantee_bytes(3 * PAGE));
    let (holds, wanted, held) = (range(&asks), range(&asks), range(&sure));
    let refuse_at_ceiling = || {
        assert_eq!(asked(wanted.try_allocate(0, 2 * PAGE)), 2);
        assert_eq!(sure.owed_bytes(), 0);
    };
    // At its own ceiling.
    holds.allocate(0, 5 * PAGE).expect("room");
    refuse_at_ceiling();
    assert_eq!(asks.withdraw(), 0, "there is none to wake, and none to ask");
    let counts = Arc::new(Counts::default());
    asks.set_memory_waker(Some(Waker::from(counts.clone())));
    refuse_at_ceiling();
    assert_eq!(counts.woken(), 0);
    holds.deallocate(0, 2 * PAGE).expect("live");
    engine.step();
    assert!(counts.woken() > 0);
    wanted.try_allocate(0, 2 * PAGE).expect("it has come");
    // Beside a guarantee of which less is held than there is.
    drop(holds);
    wanted.deallocate(0, 2 * PAGE).expect("live");
    held.allocate(0, 4 * PAGE).expect("room");
    for timeout in [0, 1] {
        let timeout = Duration::from_millis(timeout);
        let woken = counts.woken();
        assert_eq!(asked(wanted.allocate_timeout(0, 6 * PAGE, timeout)), 6);
        assert_eq!(sure.owed_bytes(), 0, "it cannot help");
        assert_eq!(counts.woken(), woken);
    }
    let woken = counts.woken();
    sure.close();
    held.deallocate(0, 4 * PAGE).expect("live");
    engine.step();
    assert!(counts.woken() > woken);
    wanted.try_allocate(0, 6 * PAGE).expect("it has come");
}
