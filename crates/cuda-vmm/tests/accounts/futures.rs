//! Allocations that are polled.

use super::{Counts, account, engine, range};
use crate::common::{PAGE, manual};
use cuda_vmm::sim::Fault;
use cuda_vmm::sys::CUDA_ERROR_OUT_OF_MEMORY;
use cuda_vmm::{EngineOptions, Quota, VmmError};
use std::future::Future;
use std::pin::pin;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

/// Sends word when it is woken.
struct Sends(Sender<()>);

impl Wake for Sends {
    fn wake(self: Arc<Self>) {
        let _ = self.0.send(());
    }
}

/// Runs a future on this thread, which sleeps until it is woken.
fn block_on<F: Future>(future: F) -> F::Output {
    let (sender, receiver) = channel();
    let waker = Waker::from(Arc::new(Sends(sender)));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
        let minute = std::time::Duration::from_secs(60);
        receiver.recv_timeout(minute).expect("it is woken");
    }
}

#[test]
fn a_future_is_ready_at_once_if_there_is_memory() {
    let (_simulated, engine) = engine(manual());
    let pool = range(&account(&engine, "a", Quota::new()));
    assert_eq!(
        block_on(pool.allocate_async(5, 7)),
        Ok(pool.base_address() + 5)
    );
    let error = VmmError::AlreadyMapped {
        offset: 6,
        bytes: 1,
    };
    assert_eq!(block_on(pool.allocate_async(6, 1)), Err(error));
    let never = block_on(pool.allocate_async(PAGE, 60 * PAGE)).expect_err("too much");
    assert!(never.is_permanent(), "{never}");
}

#[test]
fn a_future_waits_in_line_and_is_woken() {
    let (_simulated, engine) = engine(manual());
    let [holder, asks] = ["holder", "asks"].map(|name| account(&engine, name, Quota::new()));
    let (held, wanted) = (range(&holder), range(&asks));
    held.allocate(0, 8 * PAGE).expect("room");
    let counts = Arc::new(Counts::default());
    let waker = Waker::from(counts.clone());
    let mut context = Context::from_waker(&waker);
    let mut allocation = pin!(wanted.allocate_async(0, 2 * PAGE));
    assert!(allocation.as_mut().poll(&mut context).is_pending());
    assert_eq!(holder.owed_bytes(), 2 * PAGE);
    // It keeps its place, and polling it in vain wakes no task.
    let before = counts.woken();
    for _ in 0..3 {
        assert!(allocation.as_mut().poll(&mut context).is_pending());
    }
    assert_eq!(counts.woken(), before);
    held.deallocate(0, 2 * PAGE).expect("live");
    assert!(counts.woken() > before);
    engine.step();
    // A call that comes later stands behind it.
    held.try_allocate(8 * PAGE, PAGE)
        .expect_err("it is spoken for");
    let Poll::Ready(Ok(address)) = allocation.as_mut().poll(&mut context) else {
        panic!("it is served");
    };
    assert_eq!(address, wanted.base_address());
    assert_eq!(holder.owed_bytes(), 0);
    assert_eq!(Arc::strong_count(&counts), 2, "the engine holds no waker");
}

#[test]
fn a_turn_keeps_its_place_while_what_it_asks_for_changes() {
    let (_simulated, engine) = engine(manual());
    let [holder, asks, late] =
        ["holder", "asks", "late"].map(|name| account(&engine, name, Quota::new()));
    let (held, one, other, behind) = (range(&holder), range(&asks), range(&asks), range(&late));
    held.allocate(0, 8 * PAGE).expect("room");
    let mut context = Context::from_waker(Waker::noop());
    let mut turn = asks.turn();
    let polled = turn.poll_allocate_many(&[(&one, 0, PAGE), (&other, 0, PAGE)], &context);
    assert!(polled.is_pending());
    assert_eq!(holder.owed_bytes(), 2 * PAGE);
    let mut waits = pin!(behind.allocate_async(0, PAGE));
    assert!(waits.as_mut().poll(&mut context).is_pending());
    assert_eq!(holder.owed_bytes(), 3 * PAGE);
    // It asks for more, from where it stands.
    let parts = [(&one, 0, 2 * PAGE), (&other, 0, 2 * PAGE)];
    assert!(turn.poll_allocate_many(&parts, &context).is_pending());
    held.deallocate(0, 4 * PAGE).expect("live");
    engine.step();
    assert!(waits.as_mut().poll(&mut context).is_pending());
    let Poll::Ready(Ok(backed)) = turn.poll_allocate_many(&parts, &context) else {
        panic!("it is served first");
    };
    backed.keep();
    held.deallocate(4 * PAGE, PAGE).expect("live");
    engine.step();
    assert!(waits.as_mut().poll(&mut context).is_ready());
    // Errors end it at once, and dropping it leaves the line.
    let foreign = turn.poll_allocate_many(&[(&held, 0, PAGE)], &context);
    let is_foreign = |error: &VmmError| matches!(error, VmmError::ForeignAccount { .. });
    assert!(matches!(foreign, Poll::Ready(Err(error)) if is_foreign(&error)));
    let more = [(&one, 8 * PAGE, PAGE)];
    assert!(turn.poll_allocate_many(&more, &context).is_pending());
    drop(turn);
    assert_eq!((holder.owed_bytes(), late.owed_bytes()), (0, 0));
}

#[test]
fn a_future_that_is_dropped_wants_nothing() {
    let (_simulated, engine) = engine(manual());
    let [holder, asks] = ["holder", "asks"].map(|name| account(&engine, name, Quota::new()));
    let (held, wanted) = (range(&holder), range(&asks));
    held.allocate(0, 8 * PAGE).expect("room");
    let counts = Arc::new(Counts::default());
    let waker = Waker::from(counts.clone());
    let mut context = Context::from_waker(&waker);
    {
        let mut allocation = pin!(wanted.allocate_async(0, PAGE));
        assert!(allocation.as_mut().poll(&mut context).is_pending());
        assert_eq!(holder.owed_bytes(), PAGE);
    }
    assert_eq!(holder.owed_bytes(), 0);
    assert_eq!(asks.withdraw(), 0);
    drop(waker);
    assert_eq!(Arc::strong_count(&counts), 1);
}

#[test]
fn a_future_ends_when_its_pool_or_account_does() {
    let (simulated, engine) = engine(manual());
    let [holder, asks] = ["holder", "asks"].map(|name| account(&engine, name, Quota::new()));
    let (held, wanted) = (range(&holder), range(&asks));
    held.allocate(0, 8 * PAGE).expect("room");
    let mut context = Context::from_waker(Waker::noop());
    let mut allocation = pin!(wanted.allocate_async(0, PAGE));
    assert!(allocation.as_mut().poll(&mut context).is_pending());
    asks.close();
    let ended = allocation.as_mut().poll(&mut context);
    assert_eq!(ended, Poll::Ready(Err(VmmError::Closed)));
    // The device's own shortage is an error, since nothing would wake it.
    held.deallocate(0, 8 * PAGE).expect("live");
    drop(held);
    let other = range(&account(&engine, "other", Quota::new()));
    let fault = Fault::always(
        cuda_vmm::sys::DriverFunction::cuMemCreate,
        CUDA_ERROR_OUT_OF_MEMORY,
    );
    simulated.simulator.inject(fault);
    let error = block_on(other.allocate_async(0, PAGE)).expect_err("no memory");
    assert_eq!(error.driver_code(), Some(CUDA_ERROR_OUT_OF_MEMORY));
    simulated.simulator.clear_faults();
    block_on(other.allocate_async(0, PAGE)).expect("memory again");
}

#[test]
fn a_future_that_is_polled_from_within_an_allocation_waits() {
    let (simulated, engine) = engine(manual());
    let [holder, asks] = ["holder", "asks"].map(|name| account(&engine, name, Quota::new()));
    let (held, wanted) = (range(&holder), range(&asks));
    held.allocate(0, 7 * PAGE).expect("room");
    let polled = Arc::new(Mutex::new(Vec::new()));
    let is_polled = polled.clone();
    simulated.device.set_make_room(Some(Arc::new(move |_| {
        let mut allocation = pin!(wanted.allocate_async(0, 2 * PAGE));
        let mut context = Context::from_waker(Waker::noop());
        let outcome = allocation.as_mut().poll(&mut context);
        is_polled.lock().expect("no panic").push(outcome);
    })));
    // It asks twice before others make room.
    for nth in [1, 2] {
        let create = cuda_vmm::sys::DriverFunction::cuMemCreate;
        let short = Fault::nth_of(create, nth, CUDA_ERROR_OUT_OF_MEMORY);
        simulated.simulator.inject(short);
    }
    held.allocate(7 * PAGE, PAGE).expect("room was made");
    assert_eq!(*polled.lock().expect("no panic"), [Poll::Pending]);
    simulated.device.set_make_room(None);
}

#[test]
fn futures_and_threads_are_served_while_a_worker_gives_back() {
    let (_simulated, engine) = engine(EngineOptions::new());
    let accounts = ["a", "b", "c", "d"].map(|name| account(&engine, name, Quota::new()));
    std::thread::scope(|scope| {
        for (index, account) in accounts.iter().enumerate() {
            scope.spawn(move || {
                let pool = range(account);
                for round in 0..50 {
                    let pages = 1 + (index + round) % 6;
                    block_on(pool.allocate_async(0, pages * PAGE)).expect("served");
                    pool.deallocate(0, pages * PAGE).expect("live");
                }
            });
        }
    });
    drop(accounts);
    assert_eq!(engine.stats().committed_bytes, 0);
}
