//! What the store refuses, with which error, and that nothing changes.

use crate::common::{Simulated, alone, role, run_alone};
use crate::{Fixture, UNIT};
use cuda_vmm::sys::DriverFunction;
use cuda_vmm::{HostStore, HostStoreOptions, VmmError};

#[test]
fn a_full_store_names_what_is_needed_what_is_in_use_and_the_limit() {
    let fixture = Fixture::new(4);
    let refused = |bytes| {
        let calls = fixture.calls(DriverFunction::cuMemHostRegister);
        let before = fixture.store.stats();
        let outcome = fixture.simulated.unchanged(|| fixture.store.reserve(bytes));
        assert_eq!(fixture.store.stats(), before);
        assert_eq!(fixture.calls(DriverFunction::cuMemHostRegister), calls);
        outcome.expect_err("no room")
    };
    let full = |needed_bytes, in_use_units: usize| VmmError::HostStoreFull {
        needed_bytes,
        in_use_bytes: in_use_units * UNIT,
        limit_bytes: 4 * UNIT,
    };
    assert_eq!(refused(4 * UNIT + 1), full(5 * UNIT, 0));
    assert_eq!(refused(usize::MAX), full(usize::MAX, 0));
    assert!(refused(usize::MAX).is_permanent());
    let bytes = fixture.store.reserve(UNIT + 1).expect("room");
    assert_eq!(refused(2 * UNIT + 1), full(3 * UNIT, 2));
    assert!(!refused(2 * UNIT + 1).is_permanent());
    drop(bytes);
    fixture.reserve(4);
    assert_eq!(refused(0), VmmError::ZeroSize { what: "host bytes" });
}

#[test]
fn a_limit_of_nothing_refuses_everything() {
    let fixture = Fixture::new(0);
    let refused = fixture.store.reserve(1).expect_err("no room");
    assert_eq!(
        refused,
        VmmError::HostStoreFull {
            needed_bytes: UNIT,
            in_use_bytes: 0,
            limit_bytes: 0
        }
    );
    assert_eq!(fixture.store.trim(), Ok(0));
}

#[test]
fn pieces_are_whole_huge_pages() {
    let simulated = Simulated::default();
    let what = "piece size";
    for (value, expected) in [
        (0, VmmError::ZeroSize { what }),
        (
            UNIT + 4096,
            VmmError::Misaligned {
                what,
                value: UNIT + 4096,
                required: UNIT,
            },
        ),
    ] {
        let options = HostStoreOptions::new().piece_bytes(value);
        let refused = HostStore::with_options(&simulated.device, UNIT, options);
        assert_eq!(refused.expect_err("a bad size"), expected);
    }
}

#[test]
fn bytes_outside_are_neither_read_nor_written() {
    let fixture = Fixture::new(4);
    let mut bytes = fixture.store.reserve(100).expect("room");
    bytes.write(0, &[5; 100]).expect("within");
    let outside = |offset, bytes| VmmError::OutOfRange {
        offset,
        bytes,
        capacity_bytes: 100,
    };
    for (offset, length) in [(0, 101), (99, 2), (100, 1), (101, 0)] {
        // What was asked for counts, and not what is reserved.
        let refused = bytes.write(offset, &vec![6; length]);
        assert_eq!(refused, Err(outside(offset, length)));
        let mut target = vec![6; length];
        assert_eq!(
            bytes.read(offset, &mut target),
            Err(outside(offset, length))
        );
        assert!(target.iter().all(|byte| *byte == 6));
    }
    let overflow = VmmError::Overflow {
        offset: usize::MAX,
        bytes: 1,
    };
    assert_eq!(bytes.write(usize::MAX, &[6]), Err(overflow));
    crate::expect_bytes(&bytes, &[5; 100]);
}

#[test]
fn the_largest_values_are_refused_and_overflow_nothing() {
    let simulated = Simulated::default();
    let largest = usize::MAX / UNIT * UNIT;
    for piece_bytes in [1 << 50, 1 << 62, largest] {
        let options = HostStoreOptions::new().piece_bytes(piece_bytes);
        let store = HostStore::with_options(&simulated.device, usize::MAX, options);
        let store = store.expect("a store pins nothing yet");
        assert_eq!(store.stats().limit_bytes, largest);
        for bytes in [1, 1 << 62, largest - 1, largest] {
            let refused = simulated.unchanged(|| store.reserve(bytes));
            let error = refused.expect_err("no such room");
            let is_system = matches!(error, VmmError::HostMemory { call: "mmap", .. });
            assert!(is_system, "{error:?}");
        }
        let refused = store.reserve(largest + 1).expect_err("above any limit");
        let full = VmmError::HostStoreFull {
            needed_bytes: usize::MAX,
            in_use_bytes: 0,
            limit_bytes: largest,
        };
        assert_eq!(refused, full);
        assert_eq!(store.stats().in_use_bytes, 0);
    }
}

/// Lets this process have no more addresses than it has now and some bytes.
fn limit_addresses(more_bytes: u64) {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("the sizes");
    let pages = statm.split(' ').next().expect("the first");
    let bytes = pages.parse::<u64>().expect("a number") * 4096 + more_bytes;
    let limit = libc::rlimit {
        rlim_cur: bytes,
        rlim_max: bytes,
    };
    // SAFETY: the limit is a valid place, and the process runs this one test.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &limit) }, 0);
}

/// In a process of its own, as its addresses are limited.
#[test]
fn a_system_that_refuses_memory_in_the_middle_changes_nothing() {
    const NAME: &str = "bad_input::a_system_that_refuses_memory_in_the_middle_changes_nothing";
    if role().is_none() {
        return run_alone(&mut alone(NAME, "limited"));
    }
    let simulated = Simulated::default();
    const PIECE: usize = 256 << 20;
    let options = HostStoreOptions::new().piece_bytes(PIECE).threads(1);
    let store = HostStore::with_options(&simulated.device, 16 * PIECE, options);
    let store = store.expect("a store");
    let bytes = store.reserve(UNIT).expect("room");
    limit_addresses((2 * PIECE + PIECE / 2) as u64);
    let before = store.stats();
    // Two pieces more are made, and the third is refused.
    let refused = simulated.unchanged(|| store.reserve(4 * PIECE));
    let error = refused.expect_err("no addresses");
    let VmmError::HostMemory {
        call,
        bytes: named,
        reason,
    } = &error
    else {
        panic!("{error:?}");
    };
    assert_eq!((*call, *named), ("mmap", PIECE));
    assert!(
        reason.contains("memory"),
        "the system's own words: {reason}"
    );
    assert!(!error.is_permanent() && !error.is_retryable());
    let calls = |function| simulated.simulator.calls(function);
    assert_eq!(calls(DriverFunction::cuMemHostRegister), 3);
    assert_eq!(calls(DriverFunction::cuMemHostUnregister), 2);
    assert_eq!(store.stats(), before);
    // What there is can still be had.
    store
        .reserve(2 * PIECE)
        .expect("addresses for one more piece");
    drop(bytes);
}
