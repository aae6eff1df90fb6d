//! Shared chunks beside leases, pins and captures.

use crate::common::{manual, turn};
use crate::fixture::{CHUNK, Fixture, PAGE};
use cuda_vmm::{CaptureGuard, VmmError};
use std::sync::Arc;

#[test]
fn a_lease_keeps_a_shared_chunk_and_outlives_the_bytes() {
    let _turn = turn();
    let mut fixture = Fixture::new(manual(), 2);
    fixture.take(0, 0..2 * CHUNK);
    let token = Arc::new(());
    fixture.pools[0]
        .lease(0, PAGE, token.clone())
        .expect("live");
    // A view of the first pool is no obstacle.
    assert_eq!(fixture.share(0, 1, 0..2 * CHUNK), []);
    let (offset, bytes) = (0, 2 * CHUNK * PAGE);
    assert_eq!(
        fixture.pools[0].make_private(offset, bytes),
        Err(VmmError::KeptShared {
            offset,
            bytes,
            by: "a lease"
        })
    );
    // What is freed under the lease is leased, and no part of the pool.
    fixture.free(0, 0..2);
    fixture.check();
    let stats = fixture.pools[0].stats();
    assert_eq!((stats.parts.leased_bytes, stats.committed_bytes), (0, 0));
    fixture.free(1, 0..2 * CHUNK);
    fixture.settle();
    let stats = fixture.pools[0].stats();
    assert_eq!(stats.parts.leased_bytes, PAGE, "{stats}");
    assert_eq!(stats.parts.slack_bytes, PAGE, "{stats}");
    fixture.check();
    drop(token);
    fixture.settle();
    assert_eq!(fixture.pools[0].stats().parts.leased_bytes, 0);
    fixture.check();
    fixture.end();
}

#[test]
fn a_shared_chunk_that_is_leased_and_then_private_is_counted_once() {
    let _turn = turn();
    let mut fixture = Fixture::new(manual(), 2);
    fixture.take(0, 0..CHUNK);
    let token = Arc::new(());
    fixture.pools[0]
        .lease(0, PAGE, token.clone())
        .expect("live");
    fixture.share(0, 1, 0..CHUNK);
    fixture.free(0, 0..1);
    drop(token);
    // The token is asked, and the freed page gets no memory.
    let moved = fixture.pools[0].make_private(0, CHUNK * PAGE);
    assert!(moved.is_ok_and(|bytes| bytes >= (CHUNK - 1) * PAGE));
    fixture.settle();
    fixture.check();
    let stats = fixture.pools[0].stats();
    assert_eq!(stats.parts.live_page_bytes, (CHUNK - 1) * PAGE);
    assert_eq!(stats.parts.leased_bytes, 0, "{stats}");
    fixture.end();
}

#[test]
fn a_pin_keeps_a_shared_chunk_mapped_after_it_is_freed() {
    let _turn = turn();
    let mut fixture = Fixture::new(manual(), 2);
    fixture.take(0, 0..CHUNK);
    fixture.share(0, 1, 0..CHUNK);
    let pin = fixture.pools[1].pin_for_graph(0, 1).expect("live");
    let (offset, bytes) = (0, PAGE);
    assert_eq!(
        fixture.pools[1].make_private(offset, bytes),
        Err(VmmError::KeptShared {
            offset,
            bytes,
            by: "a pin"
        })
    );
    fixture.free(1, 0..CHUNK);
    fixture.settle();
    assert_eq!(fixture.pools[1].stats().chunks, 1, "it is mapped still");
    assert_eq!(fixture.account.stats().parts.shared_bytes, CHUNK * PAGE);
    assert_eq!(
        fixture.pools[1].allocate(offset, bytes),
        Err(VmmError::Shared { offset, bytes })
    );
    // The other pool lets it go too: then the pinned memory is ordinary, and parked.
    fixture.free(0, 0..CHUNK);
    fixture.settle();
    let stats = fixture.pools[1].stats();
    assert_eq!(stats.parts.parked_bytes, CHUNK * PAGE, "{stats}");
    drop(pin);
    fixture.check();
    fixture.end();
}

#[test]
fn a_pin_that_goes_lets_a_freed_shared_chunk_go() {
    let _turn = turn();
    let mut fixture = Fixture::new(manual(), 3);
    fixture.take(0, 0..CHUNK);
    fixture.share(0, 1, 0..CHUNK);
    fixture.share(0, 2, 0..CHUNK);
    let pins = [1, 2].map(|pool| fixture.pools[pool].pin_for_graph(0, 1).expect("live"));
    for pool in 0..3 {
        fixture.free(pool, 0..CHUNK);
    }
    fixture.settle();
    let parts = fixture.account.stats().parts;
    assert_eq!(parts.shared_bytes, CHUNK * PAGE, "two pins keep it");
    drop(pins);
    let parts = fixture.account.stats().parts;
    assert_eq!(parts.retiring_bytes, CHUNK * PAGE, "{parts}");
    fixture.settle();
    assert_eq!(fixture.account.stats().parts.shared_bytes, 0);
    assert_eq!(fixture.pools[1].stats().chunks, 0);
    fixture.check();
    fixture.end();
}

#[test]
fn nothing_is_moved_while_a_capture_is_declared() {
    let _turn = turn();
    let mut fixture = Fixture::new(manual(), 2);
    fixture.take(0, 0..CHUNK);
    fixture.share(0, 1, 0..CHUNK);
    let (offset, bytes) = (0, PAGE);
    let capture = CaptureGuard::new();
    assert_eq!(
        fixture.pools[1].make_private(offset, bytes),
        Err(VmmError::KeptShared {
            offset,
            bytes,
            by: "a capture"
        })
    );
    drop(capture);
    assert_eq!(
        fixture.pools[1].make_private(offset, bytes),
        Ok(CHUNK * PAGE)
    );
    fixture.check();
    fixture.end();
}
