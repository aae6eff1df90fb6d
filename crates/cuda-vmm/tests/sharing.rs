//! Pools of one account that share memory.

mod common;

#[path = "sharing/bad_input.rs"]
mod bad_input;
#[path = "sharing/closing.rs"]
mod closing;
#[path = "sharing/faults.rs"]
mod faults;
#[path = "sharing/fixture.rs"]
mod fixture;
#[path = "sharing/found.rs"]
mod found;
#[path = "sharing/kept.rs"]
mod kept;
#[path = "sharing/random.rs"]
mod random;

use common::manual;
use cuda_vmm::VmmError;
use fixture::{CHUNK, Fixture, PAGE, PAGES};
use std::time::Duration;

#[test]
fn whole_chunks_are_shared_and_counted_once() {
    let mut fixture = Fixture::new(manual(), 3);
    // Two chunks and a half.
    fixture.take(0, 0..2 * CHUNK + CHUNK / 2);
    let before = fixture.simulated.books();
    let rest = fixture.share(0, 1, 0..2 * CHUNK + CHUNK / 2);
    assert_eq!(rest, [(2 * CHUNK * PAGE, CHUNK / 2 * PAGE)]);
    let after = fixture.simulated.books();
    assert_eq!(after.physical_bytes, before.physical_bytes);
    assert_eq!(after.mappings, before.mappings + 2);
    let stats = fixture.account.stats();
    assert_eq!(stats.parts.shared_bytes, 2 * CHUNK * PAGE);
    assert_eq!(stats.parts.live_page_bytes, CHUNK / 2 * PAGE);
    assert_eq!(stats.live_bytes, (4 * CHUNK + CHUNK / 2) * PAGE);
    for range in [0, 1] {
        let pool = fixture.pools[range].stats();
        assert_eq!(pool.shared_bytes, 2 * CHUNK * PAGE);
        assert_eq!(pool.parts.shared_bytes, 0, "it is the account's");
    }
    assert_eq!(fixture.pools[1].stats().committed_bytes, 0);
    assert_eq!(fixture.pools[1].physical_memory_usage(), 2 * CHUNK * PAGE);
    fixture.check();
    // What was shared can be shared again, by the pool that got it.
    let rest = fixture.share(1, 2, 0..CHUNK + 1);
    assert_eq!(rest, [(CHUNK * PAGE, PAGE)]);
    assert_eq!(fixture.account.stats().parts.shared_bytes, 2 * CHUNK * PAGE);
    fixture.check();
    fixture.end();
}

#[test]
fn what_is_not_shared_is_allocated_and_copied_and_all_of_it_goes_with_the_guard() {
    let mut fixture = Fixture::new(manual(), 2);
    fixture.take(0, 0..CHUNK + 3);
    let (source, target) = (&fixture.pools[0], &fixture.pools[1]);
    let part = (source, target, 0, (CHUNK + 3) * PAGE);
    let shared = fixture.account.share_many(&[part]).expect("it can");
    assert_eq!(shared.parts().len(), 1);
    let rest = fixture.account.allocate_many(shared.rest());
    rest.expect("room").keep();
    assert_eq!(target.stats().live_bytes, (CHUNK + 3) * PAGE);
    drop(shared);
    assert_eq!(target.stats().live_bytes, 3 * PAGE);
    target.deallocate(CHUNK * PAGE, 3 * PAGE).expect("live");
    fixture.settle();
    assert_eq!(fixture.account.stats().parts.shared_bytes, 0);
    fixture.check();
    fixture.end();
}

#[test]
fn what_is_left_before_between_and_after_whole_chunks_is_named() {
    let mut fixture = Fixture::new(manual(), 2);
    fixture.take(0, 0..4 * CHUNK);
    // What retires is in the way of the third chunk.
    fixture.take(1, 2 * CHUNK..2 * CHUNK + 1);
    fixture.stream.synchronize().expect("done");
    let simulator = fixture.simulated.simulator.clone();
    simulator.hold_work();
    fixture.touch(1, 2 * CHUNK);
    fixture.free(1, 2 * CHUNK..2 * CHUNK + 1);
    let rest = fixture.share(0, 1, 1..4 * CHUNK);
    simulator.release_work();
    let pages = |pages: core::ops::Range<usize>| (pages.start * PAGE, pages.len() * PAGE);
    assert_eq!(rest, [pages(1..CHUNK), pages(2 * CHUNK..3 * CHUNK)]);
    fixture.check();
    fixture.end();
}

#[test]
fn the_last_owner_has_ordinary_memory_and_frees_it() {
    for first in [0, 1] {
        let mut fixture = Fixture::new(manual().park_bytes_max(PAGES * PAGE), 2);
        fixture.take(0, 0..CHUNK);
        fixture.share(0, 1, 0..CHUNK);
        let last = 1 - first;
        fixture.free(first, 0..CHUNK);
        // It is not parked: the other pool has it. What is allocated there is new.
        fixture.try_take(first, 0..1).expect("room");
        fixture.check();
        fixture.free(first, 0..1);
        fixture.settle();
        fixture.engine.trim().expect("no call fails");
        assert_eq!(fixture.pools[first].stats().chunks, 0);
        let stats = fixture.pools[last].stats();
        assert_eq!(stats.parts.live_page_bytes, CHUNK * PAGE);
        assert_eq!(fixture.account.stats().parts.shared_bytes, 0);
        fixture.check();
        // It has slack again, and is parked.
        fixture.free(last, 0..CHUNK - 1);
        assert_eq!(
            fixture.pools[last].stats().parts.slack_bytes,
            (CHUNK - 1) * PAGE
        );
        fixture.take(last, 0..CHUNK - 1);
        fixture.free(last, 0..CHUNK);
        fixture.settle();
        assert_eq!(fixture.pools[last].stats().parts.parked_bytes, CHUNK * PAGE);
        fixture.check();
        fixture.end();
    }
}

#[test]
fn memory_waits_for_the_users_of_all_pools_that_had_it() {
    let mut fixture = Fixture::new(manual(), 2);
    fixture.take(0, 0..CHUNK);
    fixture.share(0, 1, 0..CHUNK);
    fixture.stream.synchronize().expect("done");
    let held = fixture.simulated.simulator.clone();
    held.hold_work();
    // Work of the second pool on the shared memory.
    fixture.touch(1, 0);
    fixture.free(1, 0..CHUNK);
    fixture.free(0, 0..CHUNK);
    fixture.engine.step();
    let parts = fixture.engine.stats().parts;
    assert_eq!(parts.retiring_bytes, CHUNK * PAGE, "{parts}");
    assert_eq!(parts.shared_bytes, 0);
    let asked = fixture.pools[1].try_allocate(0, PAGE).unwrap_err();
    assert!(asked.is_retryable(), "{asked}");
    let VmmError::OutOfPhysicalMemory { retiring_bytes, .. } = asked else {
        panic!("{asked}");
    };
    assert_eq!(retiring_bytes, CHUNK * PAGE);
    held.release_work();
    fixture.settle();
    let stats = fixture.engine.stats();
    assert_eq!(stats.parts.retiring_bytes, 0, "{stats}");
    fixture.check();
    fixture.end();
}

#[test]
fn an_allocation_waits_for_shared_memory_that_retires() {
    let mut fixture = Fixture::new(manual().limit_bytes(2 * CHUNK * PAGE), 3);
    fixture.take(0, 0..2 * CHUNK);
    fixture.share(0, 1, 0..2 * CHUNK);
    assert!(fixture.pools[2].allocate(0, PAGE).is_err());
    fixture.free(0, 0..2 * CHUNK);
    fixture.free(1, 0..2 * CHUNK);
    // Both are needed, and come back when both pools have let them go.
    fixture.try_take(2, 0..2 * CHUNK).expect("it waits");
    fixture.check();
    // The addresses of what was shared are free again.
    fixture.free(2, 0..2 * CHUNK);
    fixture.try_take(1, 0..CHUNK).expect("room");
    fixture.check();
    fixture.end();
}

#[test]
fn bytes_in_a_shared_chunk_are_allocated_again_only_when_it_is_private() {
    let mut fixture = Fixture::new(manual(), 2);
    fixture.take(0, 0..2 * CHUNK);
    fixture.share(0, 1, 0..2 * CHUNK);
    fixture.free(1, CHUNK - 2..2 * CHUNK);
    let refused = |offset, bytes| Err(VmmError::Shared { offset, bytes });
    let (offset, bytes) = ((CHUNK - 1) * PAGE, 2 * PAGE);
    let is_shared = |fixture: &Fixture, page| fixture.pools[1].is_shared(page * PAGE, 1);
    assert!(is_shared(&fixture, CHUNK - 1) && !is_shared(&fixture, 2 * CHUNK));
    assert_eq!(
        fixture.pools[1].allocate(offset, bytes),
        refused(offset, bytes)
    );
    let wait = Duration::from_millis(1);
    assert_eq!(
        fixture.pools[1].allocate_timeout(offset, 1, wait),
        refused(offset, 1)
    );
    fixture.check();
    let moved = fixture.pools[1].make_private(offset, bytes);
    assert_eq!(moved, Ok((CHUNK - 2) * PAGE), "the pages that are live");
    assert!(!is_shared(&fixture, CHUNK - 1));
    fixture.check();
    fixture.settle();
    assert_eq!(fixture.account.stats().parts.shared_bytes, 0);
    fixture.take(1, CHUNK - 2..CHUNK + 1);
    fixture.check();
    assert_eq!(fixture.pools[1].make_private(0, 2 * CHUNK * PAGE), Ok(0));
    fixture.end();
}

#[test]
fn chunks_grow_with_what_a_pool_holds_itself() {
    let mut fixture = Fixture::new(manual(), 2);
    fixture.take(0, 0..8 * CHUNK);
    fixture.share(0, 1, 0..8 * CHUNK);
    for pool in [0, 1] {
        fixture
            .try_take(pool, 8 * CHUNK..8 * CHUNK + 1)
            .expect("room");
        let parts = fixture.pools[pool].stats().parts;
        assert_eq!(parts.total_bytes(), PAGE, "{parts}");
    }
    // Of memory that it has alone, a pool takes an eighth more.
    fixture.close(0);
    fixture.free(1, 8 * CHUNK..8 * CHUNK + 1);
    fixture.settle();
    fixture.try_take(1, 8 * CHUNK..8 * CHUNK + 1).expect("room");
    let parts = fixture.pools[1].stats().parts;
    assert_eq!(parts.slack_bytes, (CHUNK - 1) * PAGE, "{parts}");
    fixture.check();
    fixture.end();
}

#[test]
fn parent_and_children_are_made_private_each_for_itself() {
    let mut fixture = Fixture::new(manual(), 3);
    fixture.take(0, 0..CHUNK);
    fixture.share(0, 1, 0..CHUNK);
    fixture.share(0, 2, 0..CHUNK);
    assert_eq!(fixture.pools[0].make_private(0, 1), Ok(CHUNK * PAGE));
    fixture.write(0, 0..CHUNK);
    fixture.check();
    let parts = fixture.account.stats().parts;
    assert_eq!(
        (parts.shared_bytes, parts.live_page_bytes),
        (CHUNK * PAGE, CHUNK * PAGE)
    );
    assert_eq!(fixture.pools[2].make_private(0, 1), Ok(CHUNK * PAGE));
    fixture.write(2, 1..2);
    fixture.check();
    // The last one has it alone by now.
    assert_eq!(fixture.pools[1].make_private(0, 1), Ok(0));
    fixture.write(1, 0..CHUNK);
    fixture.check();
    let parts = fixture.account.stats().parts;
    assert_eq!(
        (parts.shared_bytes, parts.live_page_bytes),
        (0, 3 * CHUNK * PAGE)
    );
    fixture.end();
}

#[test]
fn there_must_be_room_for_memory_of_ones_own() {
    let options = manual().limit_bytes(3 * CHUNK * PAGE);
    let mut fixture = Fixture::new(options.park_bytes_max(PAGES * PAGE), 2);
    fixture.take(0, 0..2 * CHUNK);
    fixture.share(0, 1, 0..2 * CHUNK);
    let before = fixture.simulated.books();
    for range in [0, 1] {
        let error = fixture.pools[range].make_private(0, 2 * CHUNK * PAGE);
        let error = error.expect_err("one chunk has room");
        assert_eq!(error.shortfall_bytes(), CHUNK * PAGE, "{error}");
        assert_eq!(fixture.simulated.books(), before, "all or none");
        fixture.check();
    }
    assert_eq!(fixture.pools[1].make_private(0, 1), Ok(CHUNK * PAGE));
    fixture.check();
    // What is parked is given up for it.
    fixture.free(0, 0..CHUNK);
    fixture.settle();
    assert_eq!(fixture.pools[0].stats().parts.parked_bytes, CHUNK * PAGE);
    let rest = fixture.pools[1].make_private(0, 2 * CHUNK * PAGE);
    assert_eq!(rest, Ok(CHUNK * PAGE));
    fixture.check();
    fixture.end();
}

#[test]
fn a_pool_goes_while_others_share_its_memory() {
    let mut fixture = Fixture::new(manual(), 3);
    fixture.take(0, 0..2 * CHUNK);
    fixture.share(0, 1, 0..2 * CHUNK);
    fixture.share(1, 2, 0..CHUNK);
    fixture.close(0);
    fixture.check();
    assert_eq!(fixture.account.stats().parts.shared_bytes, CHUNK * PAGE);
    fixture.close(2);
    fixture.check();
    assert_eq!(fixture.account.stats().parts.shared_bytes, 0);
    assert_eq!(fixture.engine.stats().ranges, 3);
    fixture.close(1);
    assert_eq!(fixture.simulated.books().physical_bytes, 0);
    fixture.end();
}

#[test]
fn what_is_parked_or_made_ahead_gives_way() {
    let options = manual().park_bytes_max(PAGES * PAGE);
    let mut fixture = Fixture::with_ahead(options, 2, 2 * CHUNK * PAGE);
    fixture.engine.step();
    assert!(fixture.pools[1].stats().parts.ahead_bytes > 0);
    fixture.take(1, CHUNK..2 * CHUNK);
    fixture.free(1, CHUNK..2 * CHUNK);
    fixture.settle();
    assert!(fixture.pools[1].stats().parts.parked_bytes > 0);
    fixture.take(0, 0..2 * CHUNK);
    assert_eq!(fixture.share(0, 1, 0..2 * CHUNK), []);
    fixture.check();
    // Memory is made ahead behind what is shared.
    fixture.engine.step();
    assert!(fixture.pools[1].stats().parts.ahead_bytes > 0);
    let before = fixture.simulated.books().mappings;
    fixture.take(1, 2 * CHUNK..2 * CHUNK + 1);
    assert_eq!(fixture.simulated.books().mappings, before);
    fixture.end();
}

#[test]
fn what_retires_at_the_addresses_is_in_the_way_of_its_chunk_alone() {
    let mut fixture = Fixture::new(manual(), 2);
    fixture.take(0, 0..2 * CHUNK);
    fixture.take(1, 0..1);
    fixture.stream.synchronize().expect("done");
    fixture.simulated.simulator.hold_work();
    fixture.touch(1, 0);
    fixture.free(1, 0..1);
    let rest = fixture.share(0, 1, 0..2 * CHUNK);
    fixture.simulated.simulator.release_work();
    assert_eq!(rest, [(0, CHUNK * PAGE)]);
    fixture.check();
    fixture.end();
}

#[test]
fn compaction_and_trim_leave_shared_chunks_alone() {
    let mut fixture = Fixture::new(manual(), 2);
    fixture.take(0, 0..2 * CHUNK);
    fixture.share(0, 1, 0..CHUNK);
    fixture.free(0, 1..CHUNK);
    fixture.free(0, CHUNK + 1..2 * CHUNK);
    fixture.settle();
    assert_eq!(
        fixture.pools[0].stats().parts.slack_bytes,
        (CHUNK - 1) * PAGE
    );
    let report = fixture.pools[0].compact().expect("it can");
    assert_eq!(report.moved_bytes, PAGE);
    assert_eq!(report.skipped_bytes, 0);
    assert_eq!(fixture.engine.trim(), Ok(0));
    assert_eq!(fixture.account.stats().parts.shared_bytes, CHUNK * PAGE);
    fixture.check();
    fixture.end();
}
