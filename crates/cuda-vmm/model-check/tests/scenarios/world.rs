//! What every scenario needs: a device that finishes work in its own time, and a look at what is
//! left at the end.

use crate::books::{PAGE, books};
use crate::driver::{self, ring};
use cuda_vmm::{Device, Engine, EngineOptions, Stream, VirtualMemoryPool, WorkerMode};
use shuttle::rand::{Rng, thread_rng};
use shuttle::thread::{self, JoinHandle};

/// How often the end looks whether all is back.
const PATIENCE: usize = 5_000;

/// So many pages in bytes, which the device must never exceed.
pub fn limit(pages: usize) -> usize {
    books(|books| books.limit_bytes = Some((pages * PAGE) as u64));
    pages * PAGE
}

/// A device, with the task that finishes its work.
pub struct World {
    pub device: Device,
    working: JoinHandle<()>,
}

impl World {
    /// With a driver that has `cuCtxRecordEvent`, or one that has not.
    pub fn new(new_driver: bool) -> Self {
        let working = thread::spawn(work);
        books(|books| books.device = Some(working.thread().clone()));
        let device = driver::open(new_driver).device(0).expect("one device");
        Self { device, working }
    }

    /// An engine with a budget of so many pages, which the device must never exceed.
    pub fn engine(&self, limit_pages: usize, mode: WorkerMode) -> Engine {
        self.engine_with(limit_pages, EngineOptions::new().worker(mode))
    }

    /// The same, as the options say.
    pub fn engine_with(&self, limit_pages: usize, options: EngineOptions) -> Engine {
        let options = options.limit_bytes(limit(limit_pages));
        Engine::new(&self.device, options).expect("a limit above nothing")
    }

    pub fn stream(&self) -> Stream {
        Stream::new(&self.device).expect("no call fails")
    }

    /// Gives up the device, waits for what others still hold of it, and looks at the books.
    pub fn end(self) {
        drop(self.device);
        let mut patience = PATIENCE;
        while !books(|books| books.is_empty()) && patience > 0 {
            patience -= 1;
            thread::yield_now();
        }
        books(|books| {
            books.assert_legal();
            assert!(books.is_empty(), "left behind: {books:#?}");
            books.ending = true;
        });
        ring();
        self.working
            .join()
            .expect("the device's task does not fail");
    }
}

/// Turns of others that a piece of work may take: none, few or many.
const DURATIONS: [usize; 4] = [0, 1, 4, 16];

/// The device: finishes what is queued, one thing after the other, the streams in any order.
fn work() {
    let choose = |choices| thread_rng().gen_range(0..choices);
    loop {
        for _ in 0..DURATIONS[choose(DURATIONS.len())] {
            thread::yield_now();
        }
        // A thread that queues something rings.
        if books(|books| books.finish_one(choose)) {
            thread::yield_now();
        } else if books(|books| books.ending) {
            return;
        } else {
            thread::park();
        }
    }
}

/// Lets the device finish nothing until [`resume`].
pub fn pause() {
    books(|books| books.paused = true);
}

/// Lets the device go on.
pub fn resume() {
    books(|books| books.paused = false);
    ring();
}

/// A pool of this many pages on the engine.
pub fn pool(engine: &Engine, pages: usize) -> VirtualMemoryPool {
    VirtualMemoryPool::on_engine(engine, pages * PAGE, PAGE).expect("no call fails")
}

/// Queues a write to bytes that were handed out.
pub fn write(stream: &Stream, address: u64, bytes: usize) {
    // SAFETY: no memory is behind the addresses of the scripted driver; that they are mapped is
    // what it checks.
    unsafe { stream.memset(address, 7, bytes) }.expect("no call fails");
}

/// The parts of a snapshot add up, within the limit.
pub fn assert_adds_up(engine: &Engine) {
    let stats = engine.stats();
    assert_eq!(stats.parts.total_bytes(), stats.committed_bytes, "{stats}");
    assert!(stats.committed_bytes <= stats.limit_bytes, "{stats}");
}

/// Allocates until it works; every refusal must be one that says it can be had later.
pub fn insist(pool: &VirtualMemoryPool, offset: usize, bytes: usize) -> u64 {
    loop {
        match pool.allocate(offset, bytes) {
            Ok(address) => return address,
            Err(error) => assert!(error.is_retryable(), "{error}"),
        }
        assert_adds_up(pool.engine());
        thread::yield_now();
    }
}

/// Waits until the engine holds nothing any more: its worker sees to that, or else the steps taken
/// here.
pub fn settle(engine: &Engine, mode: WorkerMode) {
    let mut patience = PATIENCE;
    while engine.stats().committed_bytes > 0 {
        assert!(patience > 0, "{}", engine.stats());
        patience -= 1;
        if mode == WorkerMode::Manual {
            engine.step();
        }
        assert_adds_up(engine);
        thread::yield_now();
    }
}
