//! Each argument's refusals, and that they change nothing.

use crate::common::{PAGE, Simulated, failure, manual};
use crate::{CAPACITY, Fixture, LIMIT};
use cuda_vmm::sim::SimConfig;
use cuda_vmm::sys::DriverFunction;
use cuda_vmm::{Engine, PoolOptions, QuotaConflict, Stream, VirtualMemoryPool, VmmError};

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
    // A page larger than any address space is a multiple of the granularity and so a question to
    // the driver.
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
                what: QuotaConflict::Headroom,
                asked_bytes: headroom_bytes,
                available_bytes: 16 * PAGE
            }
        );
    }
}

#[test]
fn watermarks_that_do_not_hold_together_are_refused() {
    let simulated = Simulated::default();
    let refused = |what| VmmError::QuotaUnsatisfiable {
        what,
        asked_bytes: PAGE + 1,
        available_bytes: PAGE,
    };
    let options = manual().park_bytes_max(PAGE).park_bytes_min(PAGE + 1);
    assert_eq!(
        simulated
            .unchanged(|| Engine::new(&simulated.device, options))
            .err(),
        Some(refused(QuotaConflict::ParkBytesMin))
    );
    let engine = Engine::new(&simulated.device, options.park_bytes_min(PAGE)).expect("they hold");
    let options = PoolOptions::new()
        .ahead_bytes_max(PAGE)
        .ahead_bytes_min(PAGE + 1);
    let open = |options| VirtualMemoryPool::with_options(&engine, PAGE, PAGE, options);
    assert_eq!(
        simulated.unchanged(|| open(options)).err(),
        Some(refused(QuotaConflict::AheadBytesMin))
    );
    open(options.ahead_bytes_min(PAGE)).expect("they hold");
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
            let depends = matches!(error, VmmError::AlreadyMapped { .. });
            assert!(error.is_permanent() != depends && !error.is_retryable());
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
        let parts = [(PAGE, 8), (offset, bytes)];
        let error = fixture.refused(|pool| pool.deallocate_many(&parts));
        assert_eq!(error, expected);
        assert!(fixture.pool.is_mapped(PAGE, PAGE));
    }
    // Parts that are live, but not twice.
    for (parts, (offset, bytes)) in [
        ([(PAGE, 8), (PAGE, 8)], (PAGE, 8)),
        ([(PAGE, 9), (PAGE + 8, 8)], (PAGE + 8, 8)),
        ([(PAGE + 8, 8), (PAGE, 9)], (PAGE + 8, 8)),
        ([(PAGE, PAGE), (PAGE + 8, 8)], (PAGE + 8, 8)),
    ] {
        let error = fixture.refused(|pool| pool.deallocate_many(&parts));
        assert_eq!(error, VmmError::NotMapped { offset, bytes });
    }
    fixture.pool.deallocate_many(&[]).expect("nothing to do");
    assert!(fixture.pool.is_mapped(PAGE, PAGE));
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
    assert!(error.is_out_of_memory() && error.is_retryable() && !error.is_permanent());
    assert_eq!(error.shortfall_bytes(), PAGE);
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
    assert!(error.is_permanent() && !error.is_retryable());
    assert_eq!(error.shortfall_bytes(), 0);
    fixture
        .pool
        .allocate(3 * PAGE, PAGE)
        .expect("the last page");
}
