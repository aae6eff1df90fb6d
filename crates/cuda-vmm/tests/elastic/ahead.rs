//! Memory that is made before it is asked for.

use crate::common::{PAGE, Simulated, manual};
use cuda_vmm::sim::Fault;
use cuda_vmm::sys::{CUDA_ERROR_OUT_OF_MEMORY, DriverFunction};
use cuda_vmm::{Engine, EngineOptions, PoolOptions, Quota, VirtualMemoryPool, VmmError};
use std::time::{Duration, Instant};

const LIMIT: usize = 16 * PAGE;

struct Fixture {
    simulated: Simulated,
    engine: Engine,
    pool: VirtualMemoryPool,
}

impl Fixture {
    /// A pool that has four pages made ahead.
    fn new(options: EngineOptions) -> Self {
        let simulated = Simulated::default();
        let engine = Engine::new(&simulated.device, options.limit_bytes(LIMIT)).expect("an engine");
        let ahead = PoolOptions::new().ahead_bytes_max(4 * PAGE);
        let pool =
            VirtualMemoryPool::with_options(&engine, 64 * PAGE, PAGE, ahead).expect("a pool");
        Self {
            simulated,
            engine,
            pool,
        }
    }

    fn ahead_pages(&self) -> usize {
        let stats = self.engine.stats();
        assert_eq!(stats.parts.total_bytes(), stats.committed_bytes, "{stats}");
        stats.parts.ahead_bytes / PAGE
    }
}

#[test]
fn a_range_that_grows_finds_its_memory_there() {
    let fixture = Fixture::new(manual());
    assert_eq!(
        fixture.engine.step().prefetched_bytes,
        4 * PAGE,
        "before the first allocation"
    );
    assert_eq!(fixture.ahead_pages(), 4);
    assert_eq!(fixture.pool.stats().parts.ahead_bytes, 4 * PAGE);
    let simulator = &fixture.simulated.simulator;
    for page in 0..12 {
        simulator.start_trace();
        fixture
            .pool
            .allocate(page * PAGE, PAGE)
            .expect("there already");
        assert_eq!(simulator.take_trace(), [], "page {page}");
        fixture.engine.step();
        assert!(
            (2..=4).contains(&fixture.ahead_pages()),
            "{}",
            fixture.ahead_pages()
        );
    }
    // It is mapped and open.
    let stream = cuda_vmm::Stream::new(&fixture.simulated.device).expect("a stream");
    // SAFETY: live, and mapped until the pool is dropped, which waits.
    unsafe { stream.memset(fixture.pool.base_address(), 1, 12 * PAGE) }.expect("open");
    stream.synchronize().expect("done");
}

#[test]
fn the_low_watermark_says_when_memory_is_made_again() {
    // How much is made behind each of the pages that are taken.
    for (low_bytes, made) in [
        (None, [0, 0, 3, 0, 0, 3]),
        (Some(0), [0, 0, 0, 4, 0, 0]),
        (Some(1), [0, 0, 0, 4, 0, 0]),
        (Some(3 * PAGE), [0, 2, 0, 2, 0, 2]),
        (Some(4 * PAGE), [1, 1, 1, 1, 1, 1]),
    ] {
        let simulated = Simulated::default();
        let engine = Engine::new(&simulated.device, manual()).expect("an engine");
        let mut options = PoolOptions::new().ahead_bytes_max(4 * PAGE);
        options.ahead_bytes_min = low_bytes;
        let pool = VirtualMemoryPool::with_options(&engine, 64 * PAGE, PAGE, options);
        let pool = pool.expect("a pool");
        engine.step();
        let pages = made.iter().enumerate().map(|(page, _)| {
            pool.allocate(page * PAGE, PAGE).expect("there already");
            engine.step().prefetched_bytes / PAGE
        });
        assert_eq!(pages.collect::<Vec<_>>(), made, "{low_bytes:?}");
    }
}

#[test]
fn what_was_made_ahead_is_given_up_first_and_nothing_is_given_up_for_it() {
    let fixture = Fixture::new(manual());
    fixture.engine.step();
    let other = VirtualMemoryPool::on_engine(&fixture.engine, 64 * PAGE, PAGE).expect("a pool");
    other
        .allocate(0, LIMIT - 2 * PAGE)
        .expect("as much as makes it give up two pages");
    assert_eq!(fixture.ahead_pages(), 2);
    other.deallocate(0, PAGE).expect("live");
    other
        .allocate(32 * PAGE, PAGE)
        .expect("a freed page or what is ahead");
    other
        .allocate(40 * PAGE, PAGE)
        .expect("a freed page or what is ahead");
    // The budget is full, so nothing is made ahead, and no account's memory is taken for it.
    let full = fixture.engine.stats();
    fixture.pool.allocate(0, PAGE).expect("what is left");
    assert_eq!(fixture.engine.step().prefetched_bytes, 0);
    assert_eq!(
        fixture.engine.stats().parts.live_page_bytes,
        full.parts.live_page_bytes + PAGE
    );
}

#[test]
fn memory_ahead_of_an_abandoned_place_is_given_back() {
    let fixture = Fixture::new(manual());
    fixture.engine.step();
    fixture.pool.allocate(0, PAGE).expect("there");
    fixture.pool.allocate(40 * PAGE, PAGE).expect("room");
    let report = fixture.engine.step();
    assert_eq!(
        (report.drained_bytes, report.prefetched_bytes),
        (3 * PAGE, 4 * PAGE)
    );
    assert_eq!(fixture.ahead_pages(), 4);
    // The end of the range is the end of what is ahead.
    fixture.pool.allocate(62 * PAGE, PAGE).expect("room");
    fixture.engine.step();
    assert_eq!(fixture.ahead_pages(), 1);
    assert_eq!(fixture.pool.trim(), Ok(PAGE));
    assert_eq!(fixture.ahead_pages(), 0);
}

#[test]
fn what_was_freed_can_be_taken_back_without_losing_what_is_ahead() {
    let fixture = Fixture::new(manual().park_bytes_max(LIMIT));
    let pool = &fixture.pool;
    for page in 0..8 {
        pool.allocate(page * PAGE, PAGE).expect("room");
        fixture.engine.step();
    }
    let there = fixture.ahead_pages();
    assert!(there >= 2, "{there}");
    pool.deallocate_many(&[(0, PAGE), (PAGE, PAGE)])
        .expect("live");
    fixture
        .simulated
        .device
        .synchronize()
        .expect("nothing runs");
    fixture.engine.step();
    // Behind it the pages are there, so nothing is wanted, and what is ahead of the end stays.
    pool.allocate(0, PAGE).expect("parked");
    let report = fixture.engine.step();
    assert_eq!((report.drained_bytes, report.prefetched_bytes), (0, 0));
    let simulator = &fixture.simulated.simulator;
    simulator.start_trace();
    pool.allocate(8 * PAGE, 2 * PAGE).expect("there already");
    assert_eq!(simulator.take_trace(), []);
}

#[test]
fn a_driver_that_has_no_memory_ahead_is_not_asked_again_until_there_is_need() {
    let fixture = Fixture::new(manual());
    let simulator = &fixture.simulated.simulator;
    simulator.inject(Fault::always(
        DriverFunction::cuMemCreate,
        CUDA_ERROR_OUT_OF_MEMORY,
    ));
    for _ in 0..3 {
        assert_eq!(fixture.engine.step().prefetched_bytes, 0);
    }
    assert_eq!(simulator.calls(DriverFunction::cuMemCreate), 1);
    assert_eq!(fixture.engine.stats().committed_bytes, 0);
    simulator.clear_faults();
    fixture.pool.allocate(0, PAGE).expect("room");
    assert_eq!(fixture.engine.step().prefetched_bytes, 4 * PAGE);
}

#[test]
fn what_the_budget_had_no_room_for_is_made_when_there_is_some() {
    let fixture = Fixture::new(manual());
    let other = VirtualMemoryPool::on_engine(&fixture.engine, 64 * PAGE, PAGE).expect("a pool");
    other.allocate(0, LIMIT).expect("all there is");
    let step = || fixture.engine.step().prefetched_bytes / PAGE;
    assert_eq!([step(), step()], [0, 0]);
    other.deallocate(0, 4 * PAGE).expect("live");
    assert_eq!([step(), step()], [4, 0]);
    assert_eq!(fixture.ahead_pages(), 4);
}

#[test]
fn many_ranges_find_room_in_one_step_and_closed_ones_are_not_waited_for() {
    const RANGES: usize = 150;
    let simulated = Simulated::default();
    let options = manual().limit_bytes(RANGES * PAGE).chunk_bytes_max(0);
    let engine = Engine::new(&simulated.device, options).expect("an engine");
    let other = VirtualMemoryPool::on_engine(&engine, RANGES * PAGE, PAGE).expect("addresses");
    other.allocate(0, RANGES * PAGE).expect("all there is");
    let ahead = PoolOptions::new().ahead_bytes_max(PAGE);
    let account = engine.account("model", Quota::new()).expect("a free name");
    let range = |_| VirtualMemoryPool::on_account(&account, 4 * PAGE, PAGE, ahead);
    let mut ranges: Vec<_> = (0..RANGES)
        .map(|at| range(at).expect("addresses"))
        .collect();
    let step = || engine.step().prefetched_bytes / PAGE;
    assert_eq!([step(), step()], [0, 0]);
    for range in ranges.drain(100..) {
        range.close().expect("nothing is refused");
    }
    other.deallocate(0, 99 * PAGE).expect("live");
    assert_eq!([step(), step()], [0, 0], "one would find no room");
    other.deallocate(99 * PAGE, PAGE).expect("live");
    assert_eq!([step(), step()], [100, 0]);
}

#[test]
fn a_higher_limit_or_ceiling_is_room_for_memory_ahead() {
    for limit_is_short in [true, false] {
        let simulated = Simulated::default();
        let (limit, ceiling) = match limit_is_short {
            true => (LIMIT, 2 * LIMIT),
            false => (2 * LIMIT, LIMIT),
        };
        let engine = Engine::new(&simulated.device, manual().limit_bytes(limit));
        let engine = engine.expect("an engine");
        let account = engine.account("model", Quota::new().ceiling_bytes(ceiling));
        let account = account.expect("a free name");
        let pool = |options| VirtualMemoryPool::on_account(&account, 64 * PAGE, PAGE, options);
        let _ahead = pool(PoolOptions::new().ahead_bytes_max(4 * PAGE)).expect("a pool");
        let other = pool(PoolOptions::new()).expect("a pool");
        other.allocate(0, LIMIT).expect("all there is");
        let step = || engine.step().prefetched_bytes / PAGE;
        assert_eq!([step(), step()], [0, 0]);
        let more = LIMIT + 4 * PAGE;
        match limit_is_short {
            true => engine.set_limit_bytes(more),
            false => account.set_quota(Quota::new().ceiling_bytes(more)),
        }
        .expect("more");
        assert_eq!([step(), step()], [4, 0], "limit: {limit_is_short}");
    }
}

#[test]
fn the_worker_makes_it_by_itself_and_is_then_silent() {
    let fixture = Fixture::new(EngineOptions::new());
    let until = Instant::now() + Duration::from_secs(10);
    while fixture.ahead_pages() < 4 {
        assert!(Instant::now() < until, "{}", fixture.engine.stats());
        std::thread::yield_now();
    }
    let calls = fixture
        .simulated
        .simulator
        .calls(DriverFunction::cuMemCreate);
    assert_eq!(calls, 4);
    fixture.pool.close().expect("closed");
    assert_eq!(fixture.engine.stats().committed_bytes, 0);
}

#[test]
fn what_is_named_is_made_in_that_order_where_it_is_missing() {
    let fixture = Fixture::new(manual());
    let pool = &fixture.pool;
    pool.allocate(0, 3 * PAGE + 1).expect("room");
    pool.deallocate(PAGE, PAGE).expect("live");
    fixture
        .simulated
        .device
        .synchronize()
        .expect("nothing runs");
    pool.prefetch(&[
        (40 * PAGE + 5, PAGE),
        (PAGE, 1),
        (40 * PAGE, 1),
        (7 * PAGE, 9 * PAGE),
    ])
    .expect("within the range");
    // What is made first is left if the budget has room for no more.
    let other = VirtualMemoryPool::on_engine(&fixture.engine, 64 * PAGE, PAGE).expect("a pool");
    other.allocate(0, LIMIT - 6 * PAGE).expect("room");
    let report = fixture.engine.step();
    assert_eq!(
        (report.retired_bytes, report.prefetched_bytes),
        (PAGE, 3 * PAGE)
    );
    let simulator = &fixture.simulated.simulator;
    simulator.start_trace();
    pool.allocate(40 * PAGE, 2 * PAGE).expect("there");
    pool.allocate(PAGE, PAGE).expect("there");
    assert_eq!(simulator.take_trace(), []);
    // Pages 40, 41 and 1 count, and one more.
    other.deallocate(0, LIMIT - 6 * PAGE).expect("live");
    fixture.engine.step();
    pool.prefetch(&[(40 * PAGE, 2 * PAGE), (PAGE, PAGE), (7 * PAGE, 9 * PAGE)])
        .expect("within the range");
    assert_eq!(fixture.ahead_pages(), 0);
    fixture.engine.step();
    assert_eq!(fixture.ahead_pages(), 0, "it is missing in the second half");
    pool.prefetch(&[(7 * PAGE, 9 * PAGE)])
        .expect("within the range");
    assert_eq!(fixture.engine.step().prefetched_bytes, 4 * PAGE);
    simulator.start_trace();
    pool.allocate(7 * PAGE, 4 * PAGE).expect("there");
    assert_eq!(simulator.take_trace(), []);
}

#[test]
fn names_hold_until_others_are_given_and_what_is_wrong_changes_nothing() {
    let fixture = Fixture::new(manual());
    let pool = &fixture.pool;
    pool.prefetch(&[(8 * PAGE, PAGE)])
        .expect("within the range");
    assert_eq!(fixture.engine.step().prefetched_bytes, PAGE);
    for (parts, error) in [
        (
            &[(0, PAGE), (5, 0)][..],
            VmmError::ZeroSize { what: "size" },
        ),
        (
            &[(0, PAGE), (63 * PAGE, 2 * PAGE)],
            VmmError::OutOfRange {
                offset: 63 * PAGE,
                bytes: 2 * PAGE,
                capacity_bytes: 64 * PAGE,
            },
        ),
        (
            &[(usize::MAX, 2)],
            VmmError::Overflow {
                offset: usize::MAX,
                bytes: 2,
            },
        ),
    ] {
        assert_eq!(pool.prefetch(parts), Err(error));
        assert_eq!(fixture.engine.step().prefetched_bytes, 0);
    }
    // Wherever the latest allocation was.
    pool.allocate(20 * PAGE, PAGE).expect("room");
    assert_eq!(fixture.engine.step().prefetched_bytes, 0);
    assert_eq!(fixture.ahead_pages(), 1);
    // What was given up is made again when the next allocation sees it.
    assert_eq!(pool.trim(), Ok(PAGE));
    assert_eq!(fixture.engine.step().prefetched_bytes, 0);
    pool.allocate(21 * PAGE, PAGE).expect("room");
    assert_eq!(fixture.engine.step().prefetched_bytes, PAGE);
    // What is ahead of a place that is named no more goes if memory is wanted elsewhere.
    pool.prefetch(&[]).expect("nothing");
    fixture.engine.step();
    assert_eq!(fixture.ahead_pages(), 1);
    pool.prefetch(&[(2 * PAGE, PAGE)])
        .expect("within the range");
    let report = fixture.engine.step();
    assert_eq!(
        (report.drained_bytes, report.prefetched_bytes),
        (PAGE, PAGE)
    );
    let without = VirtualMemoryPool::on_engine(&fixture.engine, 64 * PAGE, PAGE).expect("a pool");
    without.prefetch(&[(0, PAGE)]).expect("within the range");
    let single = PoolOptions::new().single_handle(true).ahead_bytes_max(PAGE);
    let single = VirtualMemoryPool::with_options(&fixture.engine, 64 * PAGE, PAGE, single);
    let single = single.expect("a pool");
    single.prefetch(&[(0, PAGE)]).expect("within the range");
    assert_eq!(
        fixture.engine.step().prefetched_bytes,
        0,
        "neither makes any ahead"
    );
}

#[test]
fn a_page_that_is_named_and_was_unmapped_is_made_again() {
    let fixture = Fixture::new(manual());
    let pool = &fixture.pool;
    pool.allocate(0, 2 * PAGE).expect("room");
    pool.deallocate(0, PAGE).expect("live");
    // It still retires, so it is not missing.
    pool.prefetch(&[(0, PAGE)]).expect("within the range");
    fixture
        .simulated
        .device
        .synchronize()
        .expect("nothing runs");
    let report = fixture.engine.step();
    assert_eq!(
        (report.drained_bytes, report.prefetched_bytes),
        (PAGE, PAGE)
    );
    assert_eq!(fixture.ahead_pages(), 1);
}

#[test]
fn ranges_get_a_chunk_each_in_their_turn() {
    let fixture = Fixture::new(manual());
    let ahead = PoolOptions::new().ahead_bytes_max(4 * PAGE);
    let other = VirtualMemoryPool::with_options(&fixture.engine, 64 * PAGE, PAGE, ahead);
    let other = other.expect("a pool");
    // Room for three pages.
    let holds = VirtualMemoryPool::on_engine(&fixture.engine, 64 * PAGE, PAGE).expect("a pool");
    holds.allocate(0, LIMIT - 3 * PAGE).expect("room");
    assert_eq!(fixture.engine.step().prefetched_bytes, 3 * PAGE);
    let pages = [&fixture.pool, &other].map(|pool| pool.stats().parts.ahead_bytes / PAGE);
    assert_eq!((pages.iter().sum(), pages.iter().min()), (3, Some(&1)));
}
