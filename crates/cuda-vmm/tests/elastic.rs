//! `VirtualMemoryPool`: what it refuses, what it counts, and that it gives everything back.

mod common;

#[path = "elastic/ahead.rs"]
mod ahead;
#[path = "elastic/bad_input.rs"]
mod bad_input;
#[path = "elastic/cache.rs"]
mod cache;
#[path = "elastic/chunks.rs"]
mod chunks;
#[path = "elastic/many.rs"]
mod many;

use common::{PAGE, Simulated, failure, manual};
use cuda_vmm::sim::{Fault, SimConfig};
use cuda_vmm::sys::{CUDA_ERROR_OUT_OF_MEMORY, DriverFunction};
use cuda_vmm::{Engine, EngineOptions, PoolStats, Stream, VirtualMemoryPool, VmmError, WorkerMode};
use std::time::{Duration, Instant};

const CAPACITY: usize = 8 * PAGE;
const LIMIT: usize = 4 * PAGE;

/// A pool of eight pages on an engine of its own with a limit of four.
struct Fixture {
    simulated: Simulated,
    engine: Engine,
    pool: VirtualMemoryPool,
}

impl Fixture {
    fn new() -> Self {
        Self::with(manual().limit_bytes(LIMIT), CAPACITY)
    }

    fn with(options: EngineOptions, capacity_bytes: usize) -> Self {
        let simulated = Simulated::default();
        let engine = Engine::new(&simulated.device, options).expect("an engine");
        let pool = VirtualMemoryPool::on_engine(&engine, capacity_bytes, PAGE).expect("a pool");
        Self {
            simulated,
            engine,
            pool,
        }
    }

    /// Does something that must fail and change nothing: not the pool, the engine, or the driver's
    /// books.
    #[track_caller]
    fn refused<T: core::fmt::Debug>(
        &self,
        act: impl FnOnce(&VirtualMemoryPool) -> Result<T, VmmError>,
    ) -> VmmError {
        let before = (self.pool.stats(), self.engine.stats());
        let outcome = self.simulated.unchanged(|| act(&self.pool));
        assert_eq!((self.pool.stats(), self.engine.stats()), before);
        outcome.expect_err("a bad argument")
    }
}

#[test]
fn a_limit_is_reported_as_given_and_headroom_is_kept_free() {
    let simulated = Simulated::new(SimConfig::new().memory_bytes(16 * PAGE));
    let engine = |options| Engine::new(&simulated.device, options).expect("an engine");
    let total = engine(manual());
    assert_eq!(total.limit_bytes(), 16 * PAGE);
    assert_eq!(total.device(), &simulated.device);
    let beyond = engine(manual().limit_bytes(usize::MAX));
    assert_eq!(beyond.limit_bytes(), usize::MAX);
    assert_eq!(beyond.stats().limit_bytes, usize::MAX);

    let careful = engine(manual().limit_bytes(1 << 40).headroom_bytes(12 * PAGE));
    assert_eq!(careful.limit_bytes(), 1 << 40);
    let pool = VirtualMemoryPool::on_engine(&careful, 16 * PAGE, PAGE).expect("a pool");
    let error = pool.allocate(0, 5 * PAGE).expect_err("into the headroom");
    assert_eq!(
        error,
        VmmError::OutOfPhysicalMemory {
            asked_bytes: 5 * PAGE,
            free_bytes: 4 * PAGE,
            retiring_bytes: 0,
            reclaimable_bytes: 0,
            limit_bytes: 4 * PAGE
        }
    );
    assert!(error.is_permanent(), "no wait brings the headroom back");
    pool.allocate(0, 4 * PAGE).expect("up to it");
}

#[test]
fn a_full_device_is_the_drivers_error_and_takes_nothing() {
    let simulated = Simulated::new(SimConfig::new().memory_bytes(4 * PAGE));
    let engine = Engine::new(&simulated.device, manual().limit_bytes(1 << 40)).expect("an engine");
    let pool = VirtualMemoryPool::on_engine(&engine, CAPACITY, PAGE).expect("a pool");
    pool.allocate(0, PAGE).expect("room");
    let before = (pool.stats(), engine.stats());
    let error = simulated
        .unchanged(|| pool.allocate(PAGE, 4 * PAGE))
        .expect_err("more than the device has");
    assert_eq!(error, failure!(cuMemCreate, CUDA_ERROR_OUT_OF_MEMORY));
    assert_eq!((pool.stats(), engine.stats()), before);
    pool.allocate(PAGE, 3 * PAGE).expect("all of it");
}

#[test]
fn another_engines_parked_memory_is_given_up_when_the_device_is_full() {
    let simulated = Simulated::new(SimConfig::new().memory_bytes(4 * PAGE));
    let options = manual().park_bytes_max(usize::MAX);
    let pools = [(), ()].map(|()| {
        let engine = Engine::new(&simulated.device, options).expect("an engine");
        let pool = VirtualMemoryPool::on_engine(&engine, CAPACITY, PAGE).expect("a pool");
        (engine, pool)
    });
    let [(hoarder, first), (_, second)] = &pools;
    first.allocate(0, 3 * PAGE).expect("room");
    first.deallocate(0, 3 * PAGE).expect("live");
    assert_eq!(hoarder.step().retired_bytes, 3 * PAGE);
    assert_eq!(hoarder.stats().parts.parked_bytes, 3 * PAGE);
    second
        .allocate(0, 4 * PAGE)
        .expect("what the other had parked");
    assert_eq!(hoarder.stats().committed_bytes, 0);
}

#[test]
fn tokens_that_share_a_page_keep_it_until_the_last_is_gone() {
    let fixture = Fixture::new();
    let pool = &fixture.pool;
    let token = 1000;
    let tokens = PAGE / token + 1;
    for at in 0..tokens {
        let address = pool.allocate(at * token, token).expect("room");
        assert_eq!(address, pool.base_address() + (at * token) as u64);
    }
    assert_eq!(pool.physical_memory_usage(), 2 * PAGE);
    let stats = pool.stats();
    assert_eq!((stats.live_bytes, stats.live_pages), (tokens * token, 2));
    for at in 0..tokens - 1 {
        pool.deallocate(at * token, token).expect("live");
    }
    assert_eq!(
        pool.physical_memory_usage(),
        2 * PAGE,
        "the last token straddles both"
    );
    pool.deallocate((tokens - 1) * token, token).expect("live");
    assert_eq!(pool.physical_memory_usage(), 0);
    fixture.engine.step();
    assert_eq!(pool.stats().committed_bytes, 0);
}

#[test]
fn the_numbers_of_a_pool_say_what_it_holds() {
    let fixture = Fixture::with(manual(), CAPACITY - 100);
    let pool = &fixture.pool;
    assert_eq!(pool.capacity_bytes(), CAPACITY - 100, "as given");
    assert_eq!(pool.page_bytes(), PAGE);
    assert_eq!(fixture.simulated.books().reserved_bytes, CAPACITY);
    let empty = pool.stats();
    assert_eq!(empty.unused_bytes, CAPACITY - 100);
    assert_eq!(empty.largest_unused_run_bytes, CAPACITY - 100);
    assert_eq!((empty.committed_bytes, empty.chunks), (0, 0));

    pool.allocate(PAGE + 1, PAGE).expect("room");
    let stats = pool.stats();
    assert_eq!((stats.live_bytes, stats.live_pages), (PAGE, 2));
    assert_eq!(stats.parts.live_page_bytes, 2 * PAGE);
    assert_eq!((stats.committed_bytes, stats.chunks), (2 * PAGE, 2));
    assert_eq!(stats.unused_bytes, CAPACITY - 100 - PAGE);
    assert_eq!(
        stats.largest_unused_run_bytes,
        CAPACITY - 100 - 2 * PAGE - 1
    );
    assert_eq!(pool.engine().stats().parts.live_page_bytes, 2 * PAGE);

    pool.allocate(CAPACITY - 101, 1).expect("the last byte");
    assert_eq!(
        pool.allocate(CAPACITY - 100, 1),
        Err(VmmError::OutOfRange {
            offset: CAPACITY - 100,
            bytes: 1,
            capacity_bytes: CAPACITY - 100
        }),
        "the page goes on, the pool does not"
    );
}

#[test]
fn parked_memory_is_taken_back_without_a_driver_call() {
    let fixture = Fixture::with(manual().park_bytes_max(2 * PAGE), CAPACITY);
    let pool = &fixture.pool;
    pool.allocate(0, 3 * PAGE).expect("room");
    pool.deallocate(0, PAGE).expect("live");
    fixture.engine.step();
    pool.deallocate(PAGE, PAGE).expect("live");
    let report = fixture.engine.step();
    assert_eq!((report.retired_bytes, report.drained_bytes), (PAGE, 0));
    assert_eq!(pool.stats().parts.parked_bytes, 2 * PAGE);
    let simulator = &fixture.simulated.simulator;
    simulator.start_trace();
    pool.allocate(0, 2 * PAGE).expect("parked");
    assert_eq!(simulator.take_trace(), []);
    assert_eq!(pool.stats().parts.parked_bytes, 0);
    pool.deallocate(2 * PAGE, PAGE).expect("live");
    fixture.engine.step();
    assert_eq!(pool.trim(), Ok(PAGE));
    assert_eq!(pool.stats().committed_bytes, 2 * PAGE);
}

#[test]
fn what_is_parked_above_the_limit_goes_down_to_the_low_watermark() {
    for (low_bytes, left) in [
        (None, 3),
        (Some(4 * PAGE), 4),
        (Some(PAGE), 1),
        (Some(0), 0),
    ] {
        let mut options = manual().park_bytes_max(4 * PAGE);
        options.park_bytes_min = low_bytes;
        // A chunk a page, so that it goes back a page at a time.
        let fixture = Fixture::with(options.chunk_bytes_max(0), CAPACITY);
        let parked = |pages: usize| {
            fixture.pool.allocate(0, pages * PAGE).expect("room");
            fixture.pool.deallocate(0, pages * PAGE).expect("live");
            fixture.engine.step();
            fixture.engine.stats().parts.parked_bytes / PAGE
        };
        assert_eq!(parked(4), 4, "what may be parked is not too much");
        assert_eq!(parked(5), left, "{low_bytes:?}");
    }
}

#[test]
fn closing_and_dropping_give_everything_back() {
    let simulated = Simulated::default();
    simulated.unchanged(|| {
        let engine = Engine::new(&simulated.device, manual()).expect("an engine");
        for close in [true, false] {
            let pool = VirtualMemoryPool::on_engine(&engine, CAPACITY, PAGE).expect("a pool");
            let stream = Stream::new(&simulated.device).expect("a stream");
            pool.use_stream(&stream).expect("of this device");
            let address = pool.allocate(PAGE / 2, 3 * PAGE).expect("room");
            // SAFETY: live until the pool is closed, which waits for the stream.
            unsafe { stream.memset(address, 1, 3 * PAGE) }.expect("queued");
            if close {
                pool.close().expect("closed");
            } else {
                drop(pool);
            }
            assert_eq!(engine.stats().committed_bytes, 0);
            assert_eq!(engine.stats().ranges, 0);
        }
        assert!(!simulated.simulator.is_poisoned(0));
    });
}

#[test]
fn a_failed_reservation_leaves_the_engine_as_it_was() {
    let fixture = Fixture::new();
    fixture.simulated.simulator.inject(Fault::nth_of(
        DriverFunction::cuMemAddressReserve,
        1,
        CUDA_ERROR_OUT_OF_MEMORY,
    ));
    let error = fixture.refused(|_| VirtualMemoryPool::on_engine(&fixture.engine, CAPACITY, PAGE));
    assert_eq!(
        error,
        failure!(cuMemAddressReserve, CUDA_ERROR_OUT_OF_MEMORY)
    );
}

#[test]
fn the_worker_gives_memory_back_by_itself() {
    let simulated = Simulated::default();
    simulated.unchanged(|| {
        let options = EngineOptions::new();
        assert_eq!(options, EngineOptions::default());
        assert_eq!(options.worker, WorkerMode::Thread);
        let engine = Engine::new(&simulated.device, options).expect("an engine");
        let pool = VirtualMemoryPool::on_engine(&engine, CAPACITY, PAGE).expect("a pool");
        pool.allocate(0, 4 * PAGE).expect("room");
        pool.deallocate(0, 3 * PAGE).expect("live");
        let until = Instant::now() + Duration::from_secs(30);
        while engine.stats().committed_bytes > PAGE {
            assert!(Instant::now() < until, "{}", engine.stats());
            std::thread::yield_now();
        }
        assert_eq!(pool.physical_memory_usage(), PAGE);
    });
}

#[test]
fn the_numbers_read_well() {
    let fixture = Fixture::new();
    fixture.pool.allocate(0, 3 * PAGE / 2).expect("room");
    assert_eq!(
        fixture.pool.stats().to_string(),
        "3 MiB live in 2 pages of 2 MiB over 16 MiB of addresses; 4 MiB committed: 0 B leased, 0 B slack, \
         0 B filling, 0 B retiring, 0 B parked, 0 B ahead, 0 B quarantined"
    );
    assert_eq!(
        fixture.engine.stats().to_string(),
        "4 MiB committed of 8 MiB: 4 MiB live, 0 B leased, 0 B shared, 0 B slack, 0 B filling, 0 B retiring, \
         0 B parked, 0 B ahead, 0 B cached, 0 B quarantined; 1 ranges, 2 mappings"
    );
    assert_eq!(
        PoolStats::default().to_string(),
        "0 B live in 0 pages of 0 B over 0 B of addresses; 0 B committed: 0 B leased, 0 B slack, \
         0 B filling, 0 B retiring, 0 B parked, 0 B ahead, 0 B quarantined"
    );
}
