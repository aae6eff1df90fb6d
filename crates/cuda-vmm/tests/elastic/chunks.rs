//! Chunks of several pages: what is made at once, what grows, and what is slack.

use crate::Fixture;
use crate::common::{PAGE, Simulated, manual};
use cuda_vmm::sim::SimConfig;
use cuda_vmm::{Engine, PoolOptions, VirtualMemoryPool};

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
        (stats.parts.slack_bytes, stats.committed_bytes),
        (7 * PAGE, 64 * PAGE)
    );
    assert_eq!(pool.physical_memory_usage(), 57 * PAGE);
    pool.deallocate(7 * PAGE, PAGE).expect("live");
    fixture.engine.step();
    let stats = pool.stats();
    assert_eq!(
        (stats.parts.slack_bytes, stats.committed_bytes),
        (0, 56 * PAGE)
    );
}

/// A range that is asked for page after page takes ever fewer driver calls, and no more slack than
/// an eighth.
#[test]
fn an_extent_that_grows_is_backed_by_ever_larger_chunks() {
    let fixture = Fixture::with(manual().chunk_bytes_max(128 << 20), 1024 * PAGE);
    for page in 0..1024 {
        fixture.pool.allocate(page * PAGE, PAGE).expect("room");
        let stats = fixture.pool.stats();
        assert!(stats.parts.slack_bytes <= stats.live_bytes / 8, "{stats}");
    }
    let chunks = fixture.pool.stats().chunks;
    assert!(chunks < 100, "{chunks} chunks for 2 GiB");
    // Two ranges do not lengthen each other: what begins elsewhere begins with a page.
    fixture
        .pool
        .deallocate(512 * PAGE, 512 * PAGE)
        .expect("live");
    fixture.engine.step();
    fixture.pool.allocate(800 * PAGE, PAGE).expect("room");
    assert_eq!(
        fixture.pool.stats().parts.slack_bytes,
        0,
        "{}",
        fixture.pool.stats()
    );
}

#[test]
fn a_chunk_that_grows_stops_at_the_budget_and_at_what_is_backed_behind_it() {
    let limit = 40 * PAGE;
    let options = manual().chunk_bytes_max(128 << 20).limit_bytes(limit);
    let fixture = Fixture::with(options, 128 * PAGE);
    fixture.pool.allocate(0, 32 * PAGE).expect("room");
    fixture.pool.allocate(34 * PAGE, PAGE).expect("room");
    // A chunk of four pages would be due, but there is something after two.
    fixture.pool.allocate(32 * PAGE, PAGE).expect("room");
    assert_eq!(fixture.pool.stats().parts.slack_bytes, PAGE);
    // And here the budget has room for less than would be due.
    fixture.pool.allocate(33 * PAGE, PAGE).expect("slack");
    fixture
        .pool
        .allocate(35 * PAGE, 5 * PAGE)
        .expect("the rest of the budget");
    let stats = fixture.pool.stats();
    assert_eq!(
        (stats.committed_bytes, stats.parts.slack_bytes),
        (limit, 0),
        "{stats}"
    );
}

#[test]
fn a_range_with_single_handles_has_one_for_each_allocation() {
    let engine = Engine::new(&Simulated::default().device, manual()).expect("an engine");
    let options = PoolOptions::new().single_handle(true);
    let pool = VirtualMemoryPool::with_options(&engine, 128 * PAGE, PAGE, options).expect("a pool");
    pool.allocate(3 * PAGE, 61 * PAGE).expect("room");
    pool.allocate(64 * PAGE, PAGE).expect("room");
    assert_eq!(pool.stats().chunks, 2);
    assert_eq!(pool.stats().parts.slack_bytes, 0);
    // It goes back whole.
    pool.deallocate(3 * PAGE, 60 * PAGE).expect("live");
    engine.step();
    assert_eq!(pool.stats().parts.slack_bytes, 60 * PAGE);
    pool.deallocate(63 * PAGE, PAGE).expect("live");
    engine.step();
    assert_eq!(pool.stats().committed_bytes, PAGE);
}

/// Each sentence of the option's documentation.
#[test]
fn a_single_handle_is_for_pages_that_have_no_memory_yet() {
    let simulated = Simulated::new(SimConfig::new().memory_bytes(48 * PAGE));
    let options = manual().park_bytes_max(usize::MAX).limit_bytes(64 * PAGE);
    let engine = Engine::new(&simulated.device, options).expect("an engine");
    let options = PoolOptions::new()
        .single_handle(true)
        .ahead_bytes_max(8 * PAGE);
    let pool = VirtualMemoryPool::with_options(&engine, 128 * PAGE, PAGE, options);
    let mut pool = pool.expect("a pool");
    let handles = || simulated.books().handles;
    pool.allocate(0, 20 * PAGE).expect("room");
    assert_eq!(handles(), 1);
    assert_eq!(engine.step().prefetched_bytes, 0, "nothing is made ahead");

    // A page that a neighbour keeps has the neighbour's handle.
    pool.allocate(20 * PAGE, PAGE / 2).expect("room");
    pool.allocate(20 * PAGE + PAGE / 2, 4 * PAGE).expect("room");
    assert_eq!(handles(), 3);

    // Pages that are still parked keep theirs, and part what is missing.
    pool.allocate(36 * PAGE, 2 * PAGE).expect("room");
    pool.deallocate(36 * PAGE, 2 * PAGE).expect("live");
    simulated.device.synchronize().expect("done");
    engine.step();
    pool.allocate(34 * PAGE, 6 * PAGE).expect("room");
    assert_eq!(handles(), 6);
    pool.deallocate(34 * PAGE, 6 * PAGE).expect("live");
    simulated.device.synchronize().expect("done");
    pool.trim().expect("given back");
    pool.allocate(34 * PAGE, 6 * PAGE).expect("room");
    assert_eq!(handles(), 4, "all of it was missing");

    // The device has memory for less than a run of it: halves would do, and are not made.
    let before = simulated.books();
    let error = pool.allocate(64 * PAGE, 18 * PAGE).expect_err("no room");
    assert!(error.is_out_of_memory(), "{error}");
    assert_eq!(simulated.books(), before);

    // Only compaction parts one.
    pool.deallocate(4 * PAGE, 4 * PAGE).expect("live");
    pool.deallocate(12 * PAGE, 4 * PAGE).expect("live");
    assert_eq!(handles(), 4, "it goes back whole");
    pool.compact().expect("room");
    assert_eq!(pool.stats().parts.slack_bytes, 0);
    assert_eq!(handles(), 6, "one for each run of live pages");
}

/// The extent of 32 pages grows by a chunk of four, of which the device has memory for two or for
/// one.
#[test]
fn spare_pages_that_the_device_has_no_memory_for_are_not_charged() {
    for spare_pages in [1, 0] {
        let memory_pages = 33 + spare_pages;
        let config = SimConfig::new().memory_bytes(memory_pages * PAGE);
        let simulated = Simulated::new(config);
        let options = manual().chunk_bytes_max(128 << 20).limit_bytes(64 * PAGE);
        let engine = Engine::new(&simulated.device, options).expect("an engine");
        let pool = VirtualMemoryPool::on_engine(&engine, 64 * PAGE, PAGE).expect("a pool");
        pool.allocate(0, 32 * PAGE).expect("room");
        pool.allocate(32 * PAGE, PAGE)
            .expect("the device has a page");
        let stats = engine.stats();
        assert_eq!(stats.committed_bytes, simulated.books().physical_bytes);
        assert_eq!(stats.parts.total_bytes(), stats.committed_bytes, "{stats}");
        assert_eq!(stats.parts.slack_bytes, spare_pages * PAGE);
        pool.close().expect("closed");
        assert_eq!(engine.stats().committed_bytes, 0);
    }
}

#[test]
fn spare_pages_that_the_budget_has_no_room_for_are_left_out() {
    let options = manual().chunk_bytes_max(128 << 20).limit_bytes(33 * PAGE);
    let fixture = Fixture::with(options, 64 * PAGE);
    fixture.pool.allocate(0, 32 * PAGE).expect("room");
    // A chunk of four pages would be due.
    fixture.pool.allocate(32 * PAGE, PAGE).expect("room for it");
    assert_eq!(fixture.engine.stats().committed_bytes, 33 * PAGE);
}
