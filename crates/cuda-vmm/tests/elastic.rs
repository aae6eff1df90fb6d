//! `VirtualMemoryPool`: what it refuses, what it counts, and that it gives everything back.

mod common;

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

    /// Does something that must fail and change nothing: not the pool, the engine, or the driver's books.
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
fn a_pool_is_refused_bad_pages_and_capacities() {
    let simulated = Simulated::default();
    let engine = Engine::new(&simulated.device, manual()).expect("an engine");
    for page_bytes in [0, 1, PAGE / 2, PAGE + 4096, 3 * PAGE, usize::MAX] {
        let expected = VmmError::InvalidPageSize {
            page_bytes,
            granularity_bytes: PAGE,
        };
        let outcome =
            simulated.unchanged(|| VirtualMemoryPool::on_engine(&engine, CAPACITY, page_bytes));
        assert_eq!(outcome.expect_err("a bad page"), expected);
        let outcome =
            simulated.unchanged(|| VirtualMemoryPool::new(&simulated.device, CAPACITY, page_bytes));
        assert_eq!(outcome.expect_err("a bad page"), expected);
    }
    for (capacity_bytes, expected) in [
        (0, VmmError::ZeroSize { what: "capacity" }),
        (
            usize::MAX,
            VmmError::Overflow {
                offset: 0,
                bytes: usize::MAX,
            },
        ),
        (
            1 << 47,
            failure!(cuMemAddressReserve, CUDA_ERROR_OUT_OF_MEMORY),
        ),
        (
            1 << 63,
            failure!(cuMemAddressReserve, CUDA_ERROR_OUT_OF_MEMORY),
        ),
    ] {
        let outcome =
            simulated.unchanged(|| VirtualMemoryPool::on_engine(&engine, capacity_bytes, PAGE));
        assert_eq!(outcome.expect_err("a bad capacity"), expected);
        let outcome =
            simulated.unchanged(|| VirtualMemoryPool::new(&simulated.device, capacity_bytes, PAGE));
        assert_eq!(outcome.expect_err("a bad capacity"), expected);
    }
    // A page larger than any address space is a multiple of the granularity and so a question to the driver.
    let outcome = simulated.unchanged(|| VirtualMemoryPool::on_engine(&engine, CAPACITY, 1 << 63));
    assert_eq!(
        outcome.expect_err("no such addresses"),
        failure!(cuMemAddressReserve, CUDA_ERROR_OUT_OF_MEMORY)
    );
    assert_eq!(engine.stats().ranges, 0);
}

#[test]
fn an_engine_is_refused_limits_that_leave_nothing() {
    let simulated = Simulated::new(SimConfig::new().memory_bytes(16 * PAGE));
    let refuse = |options| {
        simulated
            .unchanged(|| Engine::new(&simulated.device, options))
            .expect_err("a bad limit")
    };
    assert_eq!(
        refuse(manual().limit_bytes(0)),
        VmmError::ZeroSize { what: "limit" }
    );
    for headroom_bytes in [16 * PAGE, usize::MAX] {
        assert_eq!(
            refuse(manual().headroom_bytes(headroom_bytes)),
            VmmError::QuotaUnsatisfiable {
                what: "headroom",
                asked_bytes: headroom_bytes,
                available_bytes: 16 * PAGE
            }
        );
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
    assert!(error.is_never(), "no wait brings the headroom back");
    pool.allocate(0, 4 * PAGE).expect("up to it");
}

#[test]
fn allocate_is_refused_bad_extents() {
    let fixture = Fixture::new();
    fixture.pool.allocate(PAGE, PAGE).expect("room");
    type Call = fn(&VirtualMemoryPool, usize, usize) -> Result<u64, VmmError>;
    let calls: [Call; 2] = [VirtualMemoryPool::allocate, VirtualMemoryPool::try_allocate];
    for call in calls {
        for (offset, bytes, expected) in [
            (0, 0, VmmError::ZeroSize { what: "size" }),
            (usize::MAX, 0, VmmError::ZeroSize { what: "size" }),
            (
                usize::MAX,
                1,
                VmmError::Overflow {
                    offset: usize::MAX,
                    bytes: 1,
                },
            ),
            (
                1,
                usize::MAX,
                VmmError::Overflow {
                    offset: 1,
                    bytes: usize::MAX,
                },
            ),
            (
                CAPACITY - 1,
                2,
                VmmError::OutOfRange {
                    offset: CAPACITY - 1,
                    bytes: 2,
                    capacity_bytes: CAPACITY,
                },
            ),
            (
                0,
                usize::MAX,
                VmmError::OutOfRange {
                    offset: 0,
                    bytes: usize::MAX,
                    capacity_bytes: CAPACITY,
                },
            ),
            (
                2 * PAGE - 1,
                2,
                VmmError::AlreadyMapped {
                    offset: 2 * PAGE - 1,
                    bytes: 2,
                },
            ),
            (
                0,
                CAPACITY,
                VmmError::AlreadyMapped {
                    offset: 0,
                    bytes: CAPACITY,
                },
            ),
        ] {
            let error = fixture.refused(|pool| call(pool, offset, bytes));
            assert_eq!(error, expected);
            assert!(error.is_never() && !error.is_later());
        }
    }
}

#[test]
fn allocate_anywhere_is_refused_what_no_run_can_hold() {
    let fixture = Fixture::new();
    fixture.pool.allocate(3 * PAGE, PAGE).expect("room");
    for (bytes, alignment, expected) in [
        (0, 1, VmmError::ZeroSize { what: "size" }),
        (1, 0, VmmError::ZeroSize { what: "alignment" }),
        (0, 0, VmmError::ZeroSize { what: "alignment" }),
        (
            4 * PAGE + 1,
            1,
            VmmError::OutOfVirtualMemory {
                asked_bytes: 4 * PAGE + 1,
                largest_free_bytes: 4 * PAGE,
            },
        ),
        (
            usize::MAX,
            1,
            VmmError::OutOfVirtualMemory {
                asked_bytes: usize::MAX,
                largest_free_bytes: 4 * PAGE,
            },
        ),
    ] {
        let error = fixture.refused(|pool| pool.allocate_anywhere(bytes, alignment));
        assert_eq!(error, expected);
    }
    let base = fixture.pool.base_address();
    let place = |bytes, alignment| {
        let address = fixture.pool.allocate_anywhere(bytes, alignment);
        (address.expect("room") - base) as usize
    };
    // An alignment need not be a power of two; one larger than the pool allows its beginning alone.
    assert_eq!(place(10, usize::MAX), 0);
    assert_eq!(place(10, 7), 14);
    assert_eq!(place(10, 256), 256);
    assert_eq!(place(1, 1), 10, "the lowest that is unused");
    assert!(
        fixture
            .pool
            .allocate_anywhere(1, usize::MAX)
            .is_err_and(|error| matches!(error, VmmError::OutOfVirtualMemory { .. }))
    );
}

#[test]
fn deallocate_is_refused_what_is_not_live_and_then_frees_nothing() {
    let fixture = Fixture::new();
    fixture.pool.allocate(PAGE, PAGE).expect("room");
    for (offset, bytes, expected) in [
        (PAGE, 0, VmmError::ZeroSize { what: "size" }),
        (
            PAGE,
            usize::MAX,
            VmmError::Overflow {
                offset: PAGE,
                bytes: usize::MAX,
            },
        ),
        (
            CAPACITY,
            1,
            VmmError::OutOfRange {
                offset: CAPACITY,
                bytes: 1,
                capacity_bytes: CAPACITY,
            },
        ),
        (
            0,
            1,
            VmmError::NotMapped {
                offset: 0,
                bytes: 1,
            },
        ),
        (
            PAGE,
            PAGE + 1,
            VmmError::NotMapped {
                offset: PAGE,
                bytes: PAGE + 1,
            },
        ),
        (
            PAGE - 1,
            PAGE,
            VmmError::NotMapped {
                offset: PAGE - 1,
                bytes: PAGE,
            },
        ),
    ] {
        let error = fixture.refused(|pool| pool.deallocate(offset, bytes));
        assert_eq!(error, expected);
        assert!(fixture.pool.is_mapped(PAGE, PAGE));
    }
    fixture.pool.deallocate(PAGE, PAGE).expect("live");
    assert_eq!(
        fixture.refused(|pool| pool.deallocate(PAGE, PAGE)),
        VmmError::NotMapped {
            offset: PAGE,
            bytes: PAGE
        },
        "a second time"
    );
}

#[test]
fn use_stream_is_refused_streams_of_others() {
    let fixture = Fixture::with(manual(), CAPACITY);
    let two = Simulated::new(SimConfig::new().devices(2));
    let engine = Engine::new(&two.device, manual()).expect("an engine");
    let pool = VirtualMemoryPool::on_engine(&engine, CAPACITY, PAGE).expect("a pool");
    let second = two.driver.device(1).expect("a second device");
    let stream = Stream::new(&second).expect("a stream");
    assert_eq!(
        two.unchanged(|| pool.use_stream(&stream)),
        Err(VmmError::WrongDevice {
            expected: 0,
            found: 1
        })
    );
    let error = fixture.refused(|pool| pool.use_stream(&stream));
    assert_eq!(error, VmmError::WrongDriver);
    let own = Stream::new(&two.device).expect("a stream");
    for _ in 0..2 {
        pool.use_stream(&own).expect("of this device");
    }
    // Named twice is named once: one event for each freeing.
    pool.allocate(0, PAGE).expect("room");
    pool.deallocate(0, PAGE).expect("live");
    let records = two.simulator.calls(DriverFunction::cuEventRecord);
    assert_eq!(records, 1);
}

#[test]
fn is_mapped_answers_for_any_extent() {
    let fixture = Fixture::new();
    let pool = &fixture.pool;
    pool.allocate(PAGE, PAGE).expect("room");
    assert!(pool.is_mapped(PAGE, PAGE));
    assert!(pool.is_mapped(2 * PAGE - 1, 1));
    for (offset, bytes) in [
        (PAGE, 0),
        (PAGE - 1, 2),
        (PAGE, PAGE + 1),
        (CAPACITY, 1),
        (usize::MAX, usize::MAX),
    ] {
        assert!(!pool.is_mapped(offset, bytes), "{bytes} at {offset}");
    }
}

#[test]
fn an_exhausted_budget_says_what_there_was_and_takes_nothing() {
    let fixture = Fixture::new();
    fixture.pool.allocate(0, 3 * PAGE).expect("room");
    let error = fixture.refused(|pool| pool.allocate(4 * PAGE, 2 * PAGE));
    assert_eq!(
        error,
        VmmError::OutOfPhysicalMemory {
            asked_bytes: 2 * PAGE,
            free_bytes: PAGE,
            retiring_bytes: 0,
            reclaimable_bytes: 0,
            limit_bytes: LIMIT
        }
    );
    assert!(error.is_out_of_memory() && error.is_later() && !error.is_never());
    assert_eq!(error.later_bytes(), PAGE);
    // Bytes in a page that is backed already cost nothing.
    let error = fixture.refused(|pool| pool.allocate(3 * PAGE, LIMIT + 1));
    assert_eq!(
        error,
        VmmError::OutOfPhysicalMemory {
            asked_bytes: LIMIT + PAGE,
            free_bytes: PAGE,
            retiring_bytes: 0,
            reclaimable_bytes: 0,
            limit_bytes: LIMIT
        }
    );
    assert!(error.is_never() && !error.is_later());
    assert_eq!(error.later_bytes(), 0);
    fixture
        .pool
        .allocate(3 * PAGE, PAGE)
        .expect("the last page");
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
    assert_eq!(hoarder.stats().parked_bytes, 3 * PAGE);
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
    assert_eq!(stats.live_page_bytes, 2 * PAGE);
    assert_eq!((stats.committed_bytes, stats.chunks), (2 * PAGE, 2));
    assert_eq!(stats.unused_bytes, CAPACITY - 100 - PAGE);
    assert_eq!(
        stats.largest_unused_run_bytes,
        CAPACITY - 100 - 2 * PAGE - 1
    );
    assert_eq!(pool.engine().stats().live_bytes, 2 * PAGE);

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
    pool.deallocate(0, 3 * PAGE).expect("live");
    let report = fixture.engine.step();
    assert_eq!(
        (report.retired_bytes, report.drained_bytes),
        (3 * PAGE, PAGE)
    );
    assert_eq!(pool.stats().parked_bytes, 2 * PAGE);
    let simulator = &fixture.simulated.simulator;
    simulator.start_trace();
    pool.allocate(PAGE, 2 * PAGE).expect("parked");
    assert_eq!(simulator.take_trace(), []);
    assert_eq!(pool.stats().parked_bytes, 0);
    pool.deallocate(2 * PAGE, PAGE).expect("live");
    fixture.engine.step();
    assert_eq!(pool.trim(), Ok(PAGE));
    assert_eq!(pool.stats().committed_bytes, PAGE);
}

#[test]
fn chunks_larger_than_a_page_leave_slack_and_are_given_back_whole() {
    let fixture = Fixture::with(manual().chunk_bytes_max(128 << 20), 64 * PAGE);
    let pool = &fixture.pool;
    pool.allocate(0, 64 * PAGE).expect("room");
    assert_eq!(pool.stats().chunks, 8, "an eighth of the ask each");
    pool.deallocate(0, 7 * PAGE).expect("live");
    fixture.engine.step();
    let stats = pool.stats();
    assert_eq!(
        (stats.slack_bytes, stats.committed_bytes),
        (7 * PAGE, 64 * PAGE)
    );
    assert_eq!(pool.physical_memory_usage(), 57 * PAGE);
    pool.deallocate(7 * PAGE, PAGE).expect("live");
    fixture.engine.step();
    let stats = pool.stats();
    assert_eq!((stats.slack_bytes, stats.committed_bytes), (0, 56 * PAGE));
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
        "3 MiB live in 2 pages of 2 MiB over 16 MiB of addresses; 4 MiB committed: 0 B slack, \
         0 B filling, 0 B retiring, 0 B parked, 0 B quarantined"
    );
    assert_eq!(
        fixture.engine.stats().to_string(),
        "4 MiB committed of 8 MiB: 4 MiB live, 0 B slack, 0 B filling, 0 B retiring, 0 B parked, \
         0 B quarantined; 1 ranges, 2 mappings"
    );
    assert_eq!(
        PoolStats::default().to_string(),
        "0 B live in 0 pages of 0 B over 0 B of addresses; 0 B committed: 0 B slack, \
         0 B filling, 0 B retiring, 0 B parked, 0 B quarantined"
    );
}
