//! Pools that sleep and wake while others lease, pin, allocate, close and wait.

use crate::books::{PAGE, books};
use crate::explore::explore;
use crate::world::{World, assert_adds_up, pool, write};
use cuda_vmm::{
    Engine, HostStore, HostStoreOptions, Keep, Stream, VirtualMemoryPool, VmmError, WakeOptions,
    WorkerMode,
};
use shuttle::thread;
use std::sync::Arc;
use std::time::Duration;

/// Pages of the pool that sleeps.
const PAGES: usize = 2;

/// A store with room for all that the pool may hold, and no more.
fn store(world: &World) -> HostStore {
    let options = HostStoreOptions::new().piece_bytes(PAGE).threads(1);
    let store = HostStore::with_options(&world.device, (PAGES + 1) * PAGE, options);
    books(|books| books.host_limit_bytes = Some((PAGES + 1) * PAGE));
    store.expect("this process")
}

/// A pool with live pages, some written on the stream that is named.
fn model(engine: &Engine, stream: &Stream) -> Arc<VirtualMemoryPool> {
    let model = pool(engine, 4);
    model.use_stream(stream).expect("same device");
    let address = model.allocate(0, PAGES * PAGE).expect("room");
    write(stream, address, PAGES * PAGE);
    Arc::new(model)
}

/// Tries until the pool sleeps. Whoever uses it meanwhile has a lease or a pin.
fn sleep(model: &VirtualMemoryPool, keep: Keep<'_>) {
    loop {
        // SAFETY: the others launch work under leases and pins only.
        match unsafe { model.sleep_shared(keep) } {
            Ok(slept) => return assert_eq!(slept.quarantined_bytes, 0),
            Err(VmmError::KeptAwake { .. }) => {}
            Err(error) => panic!("{error}"),
        }
        assert_adds_up(model.engine());
        thread::yield_now();
    }
}

/// Tries until the pool is awake.
fn wake(model: &VirtualMemoryPool) {
    while let Err(error) = model.wake() {
        assert!(error.is_retryable(), "{error}");
        assert_adds_up(model.engine());
        thread::yield_now();
    }
}

fn expect_asleep(error: &VmmError) {
    assert!(matches!(error, VmmError::Asleep { .. }), "{error}");
}

/// Others lease and pin the pool, allocate and free in it, and want its memory, while it sleeps and
/// wakes.
fn beside_others(mode: WorkerMode, keeps: bool) {
    let world = World::new(true);
    let engine = world.engine(PAGES + 1, mode);
    let store = store(&world);
    let stream = world.stream();
    let model = model(&engine, &stream);
    let address = model.base_address();
    let leasing = thread::spawn({
        let (model, stream) = (model.clone(), stream.clone());
        move || {
            let token = Arc::new(());
            match model.lease(0, PAGE, token.clone()) {
                Ok(()) => write(&stream, address, PAGE),
                Err(error) => expect_asleep(&error),
            }
            drop(token);
            match model.pin_for_graph(PAGE, PAGE) {
                Ok(pin) => {
                    write(&stream, address + PAGE as u64, PAGE);
                    drop(pin);
                }
                Err(error) => expect_asleep(&error),
            }
        }
    });
    let allocating = thread::spawn({
        let model = model.clone();
        move || match model.try_allocate(3 * PAGE, PAGE) {
            Ok(_) => loop {
                match model.deallocate(3 * PAGE, PAGE) {
                    Ok(()) => return,
                    // It is live again when the pool is awake.
                    Err(error) => expect_asleep(&error),
                }
                thread::yield_now();
            },
            Err(error) if error.is_out_of_memory() => {}
            Err(error) => expect_asleep(&error),
        }
    });
    let taking = thread::spawn({
        let other = pool(&engine, PAGES);
        move || {
            // It has room while the model sleeps.
            if let Err(error) = other.allocate(0, PAGES * PAGE) {
                assert!(error.is_retryable(), "{error}");
            }
            assert_adds_up(other.engine());
        }
    });
    sleep(
        &model,
        match keeps {
            true => Keep::Host(&store),
            false => Keep::Nothing,
        },
    );
    wake(&model);
    for thread in [leasing, allocating, taking] {
        thread.join().expect("no thread fails");
    }
    assert_eq!(model.stats().live_bytes, PAGES * PAGE);
    write(&stream, address, PAGES * PAGE);
    assert_adds_up(&engine);
    drop((model, engine, store, stream));
    world.end();
}

/// A wake that waits is served by whoever frees what is missing. The contents stream in, and the
/// pool is freed and closed meanwhile.
fn waits_and_streams(mode: WorkerMode, closes_first: bool) {
    let world = World::new(true);
    let engine = world.engine(PAGES, mode);
    let store = store(&world);
    let stream = world.stream();
    let model = model(&engine, &stream);
    sleep(&model, Keep::Host(&store));
    let other = pool(&engine, PAGES);
    let address = other.allocate(0, PAGES * PAGE).expect("room");
    let used = world.stream();
    other.use_stream(&used).expect("same device");
    write(&used, address, PAGES * PAGE);
    let waking = thread::spawn({
        let model = model.clone();
        move || {
            let options = WakeOptions::new().timeout(Duration::MAX);
            let arriving = model.wake_streaming(&options).expect("it is given back");
            model.deallocate(0, PAGE).expect("live");
            arriving
        }
    });
    other.deallocate(0, PAGE).expect("live");
    other.deallocate(PAGE, PAGE).expect("live");
    if mode == WorkerMode::Manual {
        engine.step();
    }
    let arriving = waking.join().expect("it is served");
    let model = (!closes_first).then_some(model);
    assert_adds_up(&engine);
    // Both wait for the copies.
    drop(arriving);
    assert_eq!(store.stats().in_use_bytes, 0);
    store.trim().expect("no call fails");
    drop((model, other, engine, used, stream, store));
    world.end();
}

/// A thread that has a lease or a pin may launch work at any time, so the pool does not sleep before
/// that has ended. What comes later finds the pool asleep.
fn kept_awake(pins: bool) {
    let world = World::new(true);
    let engine = world.engine(PAGES, WorkerMode::Manual);
    let stream = world.stream();
    let model = model(&engine, &stream);
    let address = model.base_address();
    let using = thread::spawn({
        let (model, stream) = (model.clone(), stream.clone());
        move || {
            let token = Arc::new(());
            let held = match pins {
                true => model.pin_for_graph(0, PAGE).map(Some),
                false => model.lease(0, PAGE, token.clone()).map(|()| None),
            };
            match held {
                Ok(pin) => {
                    // Long enough for others to put it to sleep.
                    thread::yield_now();
                    write(&stream, address, PAGE);
                    drop((token, pin));
                }
                Err(error) => expect_asleep(&error),
            }
        }
    });
    sleep(&model, Keep::Nothing);
    using.join().expect("no thread fails");
    wake(&model);
    write(&stream, address, PAGES * PAGE);
    drop((model, engine, stream));
    world.end();
}

/// The account is closed while the pool goes to sleep and wakes, and so is the pool.
fn closed_meanwhile(mode: WorkerMode) {
    let world = World::new(true);
    let engine = world.engine(PAGES, mode);
    let store = store(&world);
    let stream = world.stream();
    let model = model(&engine, &stream);
    let closing = thread::spawn({
        let model = model.clone();
        move || model.account().close()
    });
    // SAFETY: nothing is launched meanwhile.
    let slept = unsafe { model.sleep_shared(Keep::Constant(&store)) };
    let woken = model.wake();
    closing.join().expect("no thread fails");
    match slept {
        Ok(_) => assert!(matches!(woken, Ok(()) | Err(VmmError::Closed)), "{woken:?}"),
        Err(VmmError::Closed) => assert_eq!(woken, Err(VmmError::Closed)),
        Err(error) => assert!(matches!(error, VmmError::KeptAwake { .. }), "{error}"),
    }
    drop(model);
    assert_eq!(store.stats().in_use_bytes, 0);
    assert_adds_up(&engine);
    drop((engine, store, stream));
    world.end();
}

/// Two threads put the pool to sleep and wake it. Each change is made by one of them.
fn two_at_once() {
    let world = World::new(true);
    let engine = world.engine(PAGES, WorkerMode::Thread);
    let store = store(&world);
    let stream = world.stream();
    let model = model(&engine, &stream);
    let act = {
        let (model, store) = (model.clone(), store.clone());
        move || {
            // SAFETY: nothing is launched meanwhile.
            let slept = unsafe { model.sleep_shared(Keep::Host(&store)) };
            if let Err(error) = slept {
                assert!(
                    matches!(error, VmmError::Asleep { .. } | VmmError::KeptAwake { .. }),
                    "{error}"
                );
            }
            if let Err(error) = model.wake() {
                assert!(
                    matches!(error, VmmError::Asleep { .. } | VmmError::Awake { .. }),
                    "{error}"
                );
            }
        }
    };
    let other = thread::spawn(act.clone());
    act();
    other.join().expect("no thread fails");
    drop(act);
    if model.is_asleep() {
        wake(&model);
    }
    write(&stream, model.base_address(), PAGES * PAGE);
    assert_eq!(store.stats().in_use_bytes, 0);
    drop((model, engine, store, stream));
    world.end();
}

#[test]
fn a_pool_sleeps_beside_leases_pins_allocations_and_others() {
    for keeps in [true, false] {
        explore(move || beside_others(WorkerMode::Thread, keeps));
        explore(move || beside_others(WorkerMode::Manual, keeps));
    }
}

#[test]
fn leases_and_pins_keep_a_pool_awake_until_they_end() {
    explore(|| kept_awake(false));
    explore(|| kept_awake(true));
}

#[test]
fn a_wake_that_waits_is_served_and_its_contents_stream_in() {
    for closes_first in [true, false] {
        explore(move || waits_and_streams(WorkerMode::Thread, closes_first));
        explore(move || waits_and_streams(WorkerMode::Manual, closes_first));
    }
}

#[test]
fn an_account_is_closed_while_its_pool_sleeps() {
    explore(|| closed_meanwhile(WorkerMode::Thread));
    explore(|| closed_meanwhile(WorkerMode::Manual));
}

#[test]
fn two_threads_put_a_pool_to_sleep_and_wake_it() {
    explore(two_at_once);
}
