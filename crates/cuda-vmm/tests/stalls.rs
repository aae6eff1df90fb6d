//! Other threads get the engine's lock while a thread does much at once: under one hold it does at
//! most sixty-four items.

mod common;

use common::{PAGE, Simulated, manual};
use cuda_vmm::{Account, Engine, LeaseToken, PoolOptions, Quota, VirtualMemoryPool};
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Wake, Waker};

/// As much as is done under one hold of a lock.
const BITE: usize = 64;
const PARTS: usize = 300;

/// Notes what is parked each time that something has changed.
struct Notes {
    engine: Engine,
    parked: Mutex<Vec<usize>>,
}

impl Wake for Notes {
    fn wake(self: Arc<Self>) {
        let pages = self.engine.stats().parts.parked_bytes / PAGE;
        self.parked.lock().expect("no panic").push(pages);
    }
}

/// What happens to tokens, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    Asked,
    Dropped,
}

/// Tokens that are released together, and what happens to them.
#[derive(Debug, Clone, Default)]
struct Token {
    events: Arc<Mutex<Vec<Event>>>,
    is_released: Arc<AtomicBool>,
}

impl Token {
    fn note(&self, event: Event) {
        self.events.lock().expect("no panic").push(event);
    }
}

impl LeaseToken for Token {
    fn is_released(&mut self) -> bool {
        self.note(Event::Asked);
        self.is_released.load(Ordering::SeqCst)
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        self.note(Event::Dropped);
    }
}

fn engine() -> (Simulated, Engine, Account) {
    let simulated = Simulated::default();
    let options = manual().limit_bytes((PARTS + 2) * PAGE).chunk_bytes_max(0);
    let engine = Engine::new(&simulated.device, options.park_bytes_max(usize::MAX));
    let engine = engine.expect("an engine");
    let model = engine.account("model", Quota::new()).expect("no guarantee");
    (simulated, engine, model)
}

fn range(account: &Account) -> VirtualMemoryPool {
    let pool = VirtualMemoryPool::on_account(account, 1024 * PAGE, PAGE, PoolOptions::new());
    let pool = pool.expect("addresses");
    pool.allocate(0, PARTS * PAGE).expect("room");
    pool
}

/// The largest step up from one number to the next.
fn largest_step(numbers: &[usize]) -> usize {
    let steps = numbers
        .windows(2)
        .map(|pair| pair[1].saturating_sub(pair[0]));
    steps.max().expect("several")
}

#[test]
fn what_was_freed_is_parked_some_at_a_time() {
    let (_simulated, engine, model) = engine();
    let pool = range(&model);
    // By one call, and page by page.
    for parts in [1, PARTS] {
        let notes = Arc::new(Notes {
            engine: engine.clone(),
            parked: Mutex::new(vec![0]),
        });
        let waker = Waker::from(notes.clone());
        // It waits, so each change is told.
        let other = engine.account("other", Quota::new()).expect("no guarantee");
        let other = VirtualMemoryPool::on_account(&other, 1024 * PAGE, PAGE, PoolOptions::new());
        let other = other.expect("addresses");
        let mut waits = pin!(other.allocate_async(0, (PARTS + 2) * PAGE));
        assert!(
            waits
                .as_mut()
                .poll(&mut Context::from_waker(&waker))
                .is_pending()
        );
        let bytes = PARTS / parts * PAGE;
        for part in 0..parts {
            pool.deallocate(part * bytes, bytes).expect("live");
        }
        engine.step();
        let parked = notes.parked.lock().expect("no panic");
        assert_eq!(parked.last(), Some(&PARTS));
        let step = largest_step(&parked);
        assert!(step <= BITE, "{step} at once");
        drop(parked);
        pool.allocate(0, PARTS * PAGE).expect("parked");
    }
}

#[test]
fn tokens_are_asked_some_at_a_time() {
    let (_simulated, engine, model) = engine();
    let pool = range(&model);
    let token = Token::default();
    for part in 0..PARTS {
        pool.lease(part * PAGE, PAGE, token.clone()).expect("live");
    }
    pool.deallocate(0, PARTS * PAGE).expect("live");
    assert_eq!(engine.stats().parts.leased_bytes, PARTS * PAGE);
    token.is_released.store(true, Ordering::SeqCst);
    token.events.lock().expect("no panic").clear();
    engine.step();
    let events = token.events.lock().expect("no panic");
    let runs = events.chunk_by(|one, other| one == other);
    let longest = runs.map(<[Event]>::len).max();
    assert_eq!(longest, Some(BITE), "at once");
    assert_eq!(events.len(), 2 * PARTS);
    assert_eq!(engine.stats().parts.parked_bytes, PARTS * PAGE);
}
