//! Code of others: what makes room, tokens, wakers and subscribers panic, take locks of their own,
//! and call the pool.

use crate::common::told::second_subscriber;
use crate::common::{Models, PAGE, PATIENCE, Simulated, manual};
use crate::{CAPACITY, pool};
use cuda_vmm::sim::{Fault, SimConfig};
use cuda_vmm::{
    Engine, EngineOptions, LeaseToken, PoolOptions, Stream, VirtualMemoryPool, VmmError, sys,
};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Wake, Waker};
use std::thread;
use std::time::Duration;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Longer than any wait here is; a test that fails ends all the same.
const FOREVER: Duration = Duration::from_secs(60);

/// Does something on another thread, and fails if that takes for ever.
#[track_caller]
fn in_time<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> T {
    let (told, hear) = mpsc::channel();
    thread::spawn(move || told.send(act()));
    match hear.recv_timeout(2 * PATIENCE) {
        Ok(outcome) => outcome,
        Err(error) => panic!("{error}"),
    }
}

/// Looks again and again until it holds.
#[track_caller]
fn until(holds: impl Fn() -> bool) {
    let started = std::time::Instant::now();
    while !holds() {
        assert!(started.elapsed() < PATIENCE, "it never holds");
        thread::yield_now();
    }
}

/// A device of eight pages, and a pool of a hundred with two models.
fn small(options: EngineOptions) -> (Simulated, Models) {
    let simulated = Simulated::new(SimConfig::new().memory_bytes(8 * PAGE));
    let pool = pool(&simulated.device, options.limit_bytes(100 * PAGE));
    for model in ["a", "b"] {
        pool.register_model(model, CAPACITY).expect("a new name");
    }
    (simulated, pool)
}

/// What the device is to do for room, with the pool; it is called once.
fn make_room(simulated: &Simulated, pool: &Models, act: impl Fn(&Models) + Send + Sync + 'static) {
    let pool = pool.clone();
    let act = move |_| act(&pool);
    simulated.device.set_make_room(Some(Arc::new(act)));
}

fn modes() -> [EngineOptions; 2] {
    [manual(), EngineOptions::new()]
}

/// Nothing is left of the pool once its engine is gone.
#[track_caller]
fn assert_nothing_left(simulated: Simulated, pool: Models) {
    simulated.device.set_make_room(None);
    drop(pool);
    until(|| simulated.books() == Simulated::default().books());
    assert_eq!(simulated.device.quarantined_bytes(), 0);
}

#[test]
fn making_room_may_evict_the_model_that_needs_it() {
    for options in modes() {
        let (simulated, pool) = small(options);
        pool.allocate_for_model_at("a", 0, 6 * PAGE).expect("room");
        make_room(&simulated, &pool, |pool| {
            pool.unregister_model("a").expect("registered");
            pool.unregister_model("b").expect("registered");
        });
        let taken = {
            let pool = pool.clone();
            in_time(move || pool.allocate_for_model_at("b", 0, 7 * PAGE))
        };
        assert_eq!(taken, Err(VmmError::Closed));
        assert_eq!(pool.models(), Vec::<String>::new());
        until(|| {
            pool.engine().step();
            pool.stats().committed_bytes == 0 && pool.stats().ranges == 0
        });
        assert_nothing_left(simulated, pool);
    }
}

#[test]
fn making_room_may_have_another_thread_evict_the_model_that_needs_it() {
    for options in modes() {
        let (simulated, pool) = small(options);
        pool.allocate_for_model_at("a", 0, 6 * PAGE).expect("room");
        make_room(&simulated, &pool, |pool| {
            let pool = pool.clone();
            let evicts = thread::spawn(move || pool.unregister_model("b"));
            evicts.join().expect("no panic").expect("registered");
        });
        let taken = {
            let pool = pool.clone();
            in_time(move || pool.allocate_for_model_at("b", 0, 7 * PAGE))
        };
        assert!(taken.is_err());
        until(|| {
            pool.engine().step();
            pool.stats().committed_bytes == 6 * PAGE && pool.stats().ranges == 1
        });
        assert_nothing_left(simulated, pool);
    }
}

#[test]
fn making_room_may_evict_another_model_and_then_there_is_room() {
    for options in modes() {
        let (simulated, pool) = small(options);
        pool.allocate_for_model_at("a", 0, 6 * PAGE).expect("room");
        make_room(&simulated, &pool, |pool| {
            pool.unregister_model("a").expect("registered");
        });
        let taken = {
            let pool = pool.clone();
            in_time(move || pool.allocate_for_model_at("b", 0, 7 * PAGE))
        };
        taken.expect("there is room now");
        assert_nothing_left(simulated, pool);
    }
}

/// What is allocated from there finds no memory either, and the function is not called for it
/// again.
#[test]
fn making_room_may_allocate_and_is_not_called_for_that() {
    let (simulated, pool) = small(manual());
    pool.allocate_for_model_at("a", 0, 8 * PAGE).expect("room");
    let calls = Arc::new(AtomicUsize::new(0));
    make_room(&simulated, &pool, {
        let calls = calls.clone();
        move |pool| {
            calls.fetch_add(1, Ordering::SeqCst);
            let more = pool.allocate_for_model_timeout("a", PAGE, Duration::ZERO);
            assert!(more.expect_err("no memory").is_out_of_memory());
            let own = pool.allocate_for_model_at("b", 0, PAGE);
            assert!(own.expect_err("it is being taken").is_retryable());
        }
    });
    let taken = {
        let pool = pool.clone();
        in_time(move || pool.allocate_for_model_at("b", 0, PAGE))
    };
    assert!(taken.expect_err("no room was made").is_out_of_memory());
    assert_eq!(calls.load(Ordering::SeqCst), 1);
    assert_nothing_left(simulated, pool);
}

/// Something of the caller's that panics when it is dropped.
struct Loud;

impl Drop for Loud {
    fn drop(&mut self) {
        panic!("a drop of the caller's panics");
    }
}

#[test]
fn what_makes_room_may_panic_when_it_is_dropped() {
    let (simulated, pool) = small(manual());
    for _ in 0..2 {
        let loud = Loud;
        let make_room = move |_| _ = &loud;
        simulated.device.set_make_room(Some(Arc::new(make_room)));
    }
    drop(pool);
    // The device has the last one.
    let Simulated { device, driver, .. } = simulated;
    drop(device);
    drop(driver);
}

/// A token that does what it is told to.
struct Token<A, D> {
    ask: A,
    // Last, so that it is dropped.
    _dropped: D,
}

impl<A: FnMut() -> bool + Send + 'static, D: Send + 'static> LeaseToken for Token<A, D> {
    fn is_released(&mut self) -> bool {
        (self.ask)()
    }
}

impl<A, D> fmt::Debug for Token<A, D> {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        panic!("no code prints a token");
    }
}

#[test]
fn a_token_may_panic_when_it_is_asked_and_when_it_is_dropped() {
    for options in modes() {
        let simulated = Simulated::default();
        let pool = pool(&simulated.device, options.limit_bytes(8 * PAGE));
        pool.register_model("a", CAPACITY).expect("a new name");
        let model = pool.model("a").expect("registered");
        model.allocate(0, 4 * PAGE).expect("room");
        let is_over = Arc::new(AtomicBool::new(false));
        for page in 0..2 {
            let is_over = is_over.clone();
            let ask = move || match is_over.load(Ordering::SeqCst) {
                true => true,
                false => panic!("a token of the caller's panics"),
            };
            let token = Token {
                ask,
                _dropped: Loud,
            };
            model.lease(page * PAGE, PAGE, token).expect("live");
        }
        _ = format!("{model:?}");
        model.deallocate(0, PAGE).expect("live");
        model.deallocate(2 * PAGE, PAGE).expect("live");
        assert_eq!(model.stats().parts.leased_bytes, PAGE);
        assert!(model.is_leased(PAGE, PAGE));
        is_over.store(true, Ordering::SeqCst);
        until(|| {
            pool.engine().step();
            pool.stats().committed_bytes == 2 * PAGE
        });
        // One more ends with the pool.
        model
            .lease(
                3 * PAGE,
                PAGE,
                Token {
                    ask: || true,
                    _dropped: Loud,
                },
            )
            .expect("live");
        model.lease(PAGE, PAGE, Arc::new(7)).expect("live");
        drop(model);
        assert_nothing_left(simulated, pool);
    }
}

#[test]
fn a_token_may_call_its_own_pool_when_it_is_asked() {
    for options in modes() {
        let simulated = Simulated::default();
        let pool = pool(&simulated.device, options.limit_bytes(8 * PAGE));
        pool.register_model("a", CAPACITY).expect("a new name");
        let model = pool.model("a").expect("registered");
        model.allocate(0, 2 * PAGE).expect("room");
        let asked = Arc::new(AtomicUsize::new(0));
        let token = {
            let (model, asked) = (Arc::downgrade(&model), asked.clone());
            let ask = move || {
                if let Some(model) = model.upgrade() {
                    model.allocate(4 * PAGE, PAGE).expect("room");
                    model.deallocate(4 * PAGE, PAGE).expect("live");
                    assert!(model.is_leased(0, PAGE));
                    model.engine().step();
                }
                asked.fetch_add(1, Ordering::SeqCst) > 2
            };
            Token { ask, _dropped: () }
        };
        model.lease(0, PAGE, token).expect("live");
        let freed = model.clone();
        in_time(move || freed.deallocate(0, PAGE)).expect("live");
        let engine = pool.engine().clone();
        in_time(move || {
            until(|| {
                engine.step();
                engine.stats().committed_bytes == PAGE
            })
        });
        assert!(asked.load(Ordering::SeqCst) > 2);
        drop(model);
        assert_nothing_left(simulated, pool);
    }
}

type Act = Box<dyn FnMut(&str) + Send>;

/// A subscriber that acts on each event, one at a time; with what it does it may cause more, of
/// which it is not told.
struct Acting(Mutex<Act>);

impl Subscriber for Acting {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::TRACE
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        self.act(span.metadata().name());
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = String::new();
        event.record(&mut |_: &tracing::field::Field, value: &dyn fmt::Debug| {
            text.push_str(&format!("{value:?};"));
        });
        self.act(&text);
    }

    fn enter(&self, _: &Id) {
        self.act("enter");
    }

    fn exit(&self, _: &Id) {
        self.act("exit");
    }
}

impl Acting {
    fn act(&self, text: &str) {
        // A poisoned lock is one that a panic of its own has left.
        let act = self.0.try_lock();
        match act {
            Ok(mut act) => act(text),
            Err(std::sync::TryLockError::Poisoned(act)) => act.into_inner()(text),
            Err(std::sync::TryLockError::WouldBlock) => {}
        }
    }
}

/// Everything that a pool does, beside this subscriber.
fn beside(simulated: &Simulated, options: EngineOptions, act: impl Fn(&Models) + Send + 'static) {
    let pool = pool(
        &simulated.device,
        options.limit_bytes(16 * PAGE).cache_bytes_max(2 * PAGE),
    );
    let acting = {
        let pool = pool.clone();
        Acting(Mutex::new(Box::new(move |_| act(&pool))))
    };
    let _second = second_subscriber();
    let dispatch = tracing::Dispatch::new(acting);
    in_time(move || {
        tracing::dispatcher::with_default(&dispatch, || {
            for _ in 0..2 {
                _ = pool.register_model("a", CAPACITY);
                let Ok(model) = pool.model("a") else { continue };
                if model.allocate(0, 3 * PAGE).is_ok() {
                    _ = model.lease(0, PAGE, Arc::new(1));
                    _ = model.pin_for_graph(PAGE, PAGE).map(drop);
                    _ = model.deallocate(0, PAGE);
                }
                _ = model.allocate_timeout(8 * PAGE, 20 * PAGE, Duration::from_millis(5));
                _ = pool.trim();
                pool.engine().step();
                _ = pool.unregister_model("a");
            }
            let engine = pool.engine().clone();
            until(|| {
                engine.step();
                engine.stats().committed_bytes == engine.stats().parts.cached_bytes
            });
        });
        drop(dispatch);
    });
}

#[test]
fn a_subscriber_may_panic() {
    for options in modes() {
        let simulated = Simulated::default();
        let empty = simulated.books();
        beside(&simulated, options, |_| panic!("a subscriber panics"));
        until(|| simulated.books() == empty);
    }
}

#[test]
fn a_subscriber_may_evict_the_model_of_which_it_is_told() {
    for options in modes() {
        let simulated = Simulated::default();
        let empty = simulated.books();
        beside(&simulated, options, |pool| _ = pool.unregister_model("a"));
        until(|| simulated.books() == empty);
    }
}

#[test]
fn a_subscriber_may_allocate_free_register_and_step() {
    for options in modes() {
        let simulated = Simulated::default();
        let empty = simulated.books();
        beside(&simulated, options, |pool| {
            if pool.register_model("b", CAPACITY).is_ok() {
                _ = pool.allocate_for_model_at("b", 0, 15 * PAGE);
            }
            // All of these would wait if another thread did what this one is in.
            _ = pool.allocate_for_model_at("a", 0, 4 * PAGE);
            _ = pool.deallocate_for_model("a", 0, PAGE);
            _ = pool.allocate_for_model_timeout("a", 16 * PAGE, FOREVER);
            pool.engine().step();
            _ = pool.trim();
            _ = pool.unregister_model("b");
        });
        until(|| simulated.books() == empty);
    }
}

#[test]
fn a_subscriber_may_allocate_when_a_free_has_no_fence() {
    for options in modes() {
        let simulated = Simulated::default();
        let pool = pool(&simulated.device, options.limit_bytes(4 * PAGE));
        for name in ["frees", "wants"] {
            pool.register_model(name, CAPACITY).expect("a new name");
        }
        let [frees, wants] = ["frees", "wants"].map(|name| pool.model(name).expect("there"));
        let stream = Stream::new(&simulated.device).expect("a stream");
        frees.use_stream(&stream).expect("of the device");
        frees.allocate(0, 4 * PAGE).expect("room");
        let refused = sys::CUDA_ERROR_UNKNOWN;
        let fault = Fault::always(sys::DriverFunction::cuEventRecord, refused);
        simulated.simulator.inject(fault);
        let asked = Arc::new(AtomicBool::new(false));
        let acting = {
            let (wants, asked) = (wants.clone(), asked.clone());
            Acting(Mutex::new(Box::new(move |text| {
                if text.contains("cuEventRecord") && !asked.swap(true, Ordering::SeqCst) {
                    // What it would wait for is in this thread's own hands.
                    let error = wants.allocate(0, PAGE).expect_err("not freed yet");
                    assert!(error.is_retryable(), "{error}");
                }
            })))
        };
        let _second = second_subscriber();
        let dispatch = tracing::Dispatch::new(acting);
        let act = move || frees.deallocate(0, 4 * PAGE);
        in_time(move || tracing::dispatcher::with_default(&dispatch, act)).expect("live");
        assert!(asked.load(Ordering::SeqCst));
        simulated.simulator.clear_faults();
        in_time(move || wants.allocate(0, PAGE)).expect("it was freed");
        drop(stream);
        assert_nothing_left(simulated, pool);
    }
}

/// A waker that frees on the thread that wakes it, and panics.
struct Frees(Mutex<Option<Arc<VirtualMemoryPool>>>);

impl Wake for Frees {
    fn wake(self: Arc<Self>) {
        let model = self.0.lock().expect("no panic").take();
        if let Some(model) = model {
            model.deallocate(0, 4 * PAGE).expect("live");
            drop(model);
            panic!("a waker panics");
        }
    }
}

#[test]
fn a_waker_may_free_on_the_thread_that_waits_and_panic() {
    for options in modes() {
        let simulated = Simulated::default();
        let pool = pool(&simulated.device, options.limit_bytes(4 * PAGE));
        for name in ["holds", "wants"] {
            pool.register_model(name, CAPACITY).expect("a new name");
        }
        let [holds, wants] = ["holds", "wants"].map(|name| pool.model(name).expect("there"));
        holds.allocate(0, 4 * PAGE).expect("room");
        let waker = Waker::from(Arc::new(Frees(Mutex::new(Some(holds.clone())))));
        holds.account().set_owed_waker(Some(waker));
        let waits = wants.clone();
        in_time(move || waits.allocate_timeout(0, PAGE, FOREVER)).expect("it was freed");
        drop((holds, wants));
        assert_nothing_left(simulated, pool);
    }
}

/// Has another thread do something in the middle of `act`, at an event of this text; `act` goes on
/// when that thread waits for memory or is done. Returns whether it was done by then.
fn with_another_thread<T: Send + 'static>(
    text: &'static str,
    engine: Engine,
    other: impl FnOnce() -> T + Send + 'static,
    act: impl FnOnce(),
) -> (T, bool) {
    let (told, hear) = mpsc::channel();
    let mut other = Some(other);
    let acting = Acting(Mutex::new(Box::new(move |event| {
        let is_meant = event.contains(text);
        let Some(other) = other.take_if(|_| is_meant) else {
            return;
        };
        let waits = engine.counters().waits;
        let thread = thread::spawn(other);
        until(|| engine.counters().waits > waits || thread.is_finished());
        let is_done = thread.is_finished();
        told.send((thread, is_done)).expect("heard");
    })));
    let _second = second_subscriber();
    tracing::dispatcher::with_default(&tracing::Dispatch::new(acting), act);
    let (thread, is_done) = hear.try_recv().expect("it was told");
    (thread.join().expect("no panic"), is_done)
}

/// Also after others made room for the pool.
#[test]
fn a_pool_closes_when_memory_that_another_thread_makes_ahead_is_made() {
    let simulated = Simulated::new(SimConfig::new().memory_bytes(8 * PAGE));
    let engine = Engine::new(&simulated.device, manual().limit_bytes(100 * PAGE));
    let engine = engine.expect("an engine");
    let options = PoolOptions::new().ahead_bytes_max(PAGE);
    let pool = VirtualMemoryPool::with_options(&engine, 64 * PAGE, PAGE, options);
    let pool = pool.expect("addresses");
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    simulated.device.set_make_room(Some(Arc::new(move |_| {
        count.fetch_add(1, Ordering::SeqCst);
    })));
    pool.allocate(0, 9 * PAGE).expect_err("no room was made");
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    pool.allocate(0, PAGE).expect("room");
    let (closed, is_closed_before) = with_another_thread(
        "created memory",
        engine.clone(),
        move || pool.close(),
        || _ = engine.step(),
    );
    assert_eq!((closed, is_closed_before), (Ok(()), false));
    let stats = engine.stats();
    assert_eq!((stats.ranges, stats.committed_bytes), (0, 0), "{stats}");
    simulated.device.set_make_room(None);
}

#[test]
fn an_allocation_waits_for_what_another_thread_is_about_to_free() {
    let simulated = Simulated::default();
    let engine = Engine::new(&simulated.device, manual().limit_bytes(4 * PAGE));
    let engine = engine.expect("an engine");
    let range = || VirtualMemoryPool::on_engine(&engine, 64 * PAGE, PAGE).expect("addresses");
    let (frees, wants) = (range(), range());
    let stream = Stream::new(&simulated.device).expect("a stream");
    frees.use_stream(&stream).expect("of the device");
    frees.allocate(0, 4 * PAGE).expect("room");
    // It is retiring, and not in the queue yet. Of the fence that is refused a subscriber is told.
    let refused = Fault::nth_of(
        sys::DriverFunction::cuEventRecord,
        1,
        sys::CUDA_ERROR_UNKNOWN,
    );
    simulated.simulator.inject(refused);
    let (taken, is_taken_before) = with_another_thread(
        "cuEventRecord",
        engine.clone(),
        move || wants.allocate(0, PAGE).map(drop),
        || frees.deallocate(0, 4 * PAGE).expect("live"),
    );
    assert_eq!((taken, is_taken_before), (Ok(()), false));
}
