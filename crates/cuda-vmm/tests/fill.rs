//! Filling memory of a pool through pinned memory: every byte comes from where it belongs, and after
//! a failure nothing is held.

mod common;

use common::{Simulated, failure};
use cuda_vmm::sim::{Fault, SimConfig};
use cuda_vmm::sys::{CUDA_ERROR_OPERATING_SYSTEM, DriverFunction};
use cuda_vmm::{
    Engine, EngineOptions, HostStore, HostStoreOptions, Stream, VirtualMemoryPool, VmmError,
};
use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

const UNIT: usize = 2 << 20;

struct Fixture {
    pool: VirtualMemoryPool,
    store: HostStore,
    simulated: Simulated,
}

impl Fixture {
    /// With 20 units of memory, and a store of eight in pieces of three.
    fn new(threads: usize) -> Self {
        let simulated = Simulated::new(SimConfig::new().granularity_bytes(UNIT));
        let engine = Engine::new(&simulated.device, EngineOptions::new()).expect("an engine");
        let pool = VirtualMemoryPool::on_engine(&engine, 64 * UNIT, UNIT).expect("addresses");
        pool.allocate(0, 20 * UNIT).expect("room");
        let options = HostStoreOptions::new()
            .piece_bytes(3 * UNIT)
            .threads(threads);
        let store = HostStore::with_options(&simulated.device, 8 * UNIT, options);
        Self {
            pool,
            store: store.expect("whole pieces"),
            simulated,
        }
    }

    fn fill(
        &self,
        offset: usize,
        bytes: usize,
        read: impl Fn(usize, &mut [u8]) -> Result<(), VmmError> + Sync,
    ) -> Result<(), VmmError> {
        let filled = self.pool.fill(offset, bytes, &self.store, read);
        assert_eq!(self.store.stats().in_use_bytes, 0);
        assert_eq!(self.simulated.device.quarantined_host_bytes(), 0);
        filled
    }

    fn read(&self, offset: usize, bytes: usize) -> Vec<u8> {
        let stream = Stream::new(&self.simulated.device).expect("a stream");
        let mut found = vec![0; bytes];
        let address = self.pool.base_address() + offset as u64;
        // SAFETY: the bytes are live.
        unsafe { stream.read(address, &mut found) }.expect("mapped");
        found
    }
}

/// What belongs at an offset.
fn byte(offset: usize) -> u8 {
    (offset / 977 + offset * 31) as u8
}

fn write(offset: usize, target: &mut [u8]) {
    for (at, target) in target.iter_mut().enumerate() {
        *target = byte(offset + at);
    }
}

#[test]
fn every_byte_comes_from_where_it_belongs_and_no_other_changes() {
    for (threads, offset, bytes) in [
        (1, 0, 1),
        (1, 5, 11 * UNIT),
        (2, UNIT - 3, 13 * UNIT + 8),
        (2, 2 * UNIT, 3 * UNIT),
        (5, 7, 2 * UNIT),
    ] {
        let fixture = Fixture::new(threads.min(2));
        let seen = Mutex::new(HashSet::new());
        let filled = fixture.fill(offset, bytes, |first, target| {
            assert!((1..=UNIT).contains(&target.len()));
            assert!(
                seen.lock().expect("no panic").insert(first),
                "{first} twice"
            );
            write(first, target);
            Ok(())
        });
        filled.expect("filled");
        let found = fixture.read(offset, bytes);
        let wrong = found
            .iter()
            .enumerate()
            .position(|(at, found)| *found != byte(offset + at));
        assert_eq!(wrong, None, "{threads} threads, {bytes} bytes at {offset}");
        let around = offset.saturating_sub(9)..offset;
        assert!(
            fixture.read(around.start, around.len().max(1))[..around.len()]
                .iter()
                .all(|it| *it == 0)
        );
        assert!(fixture.read(offset + bytes, 9).iter().all(|it| *it == 0));
    }
}

#[test]
fn parts_are_read_while_others_are_copied() {
    let fixture = Fixture::new(1);
    let simulator = &fixture.simulated.simulator;
    let read = AtomicUsize::new(0);
    thread::scope(|scope| {
        let held = fixture.simulated.hold_work();
        let fill = || {
            fixture.fill(0, 20 * UNIT, |offset, target| {
                read.fetch_add(1, Ordering::SeqCst);
                write(offset, target);
                Ok(())
            })
        };
        let filling = scope.spawn(fill);
        // One thread has four buffers, and no copy ends.
        while simulator.calls(DriverFunction::cuEventRecord) < 4 {
            thread::yield_now();
        }
        assert_eq!(read.load(Ordering::SeqCst), 4);
        drop(held);
        filling.join().expect("no panic").expect("filled");
    });
    assert!(
        fixture
            .read(19 * UNIT, UNIT)
            .iter()
            .enumerate()
            .all(|(at, found)| *found == byte(19 * UNIT + at))
    );
}

#[test]
fn the_first_failure_ends_it() {
    let fixture = Fixture::new(2);
    let calls = AtomicUsize::new(0);
    let refused = fixture.fill(0, 20 * UNIT, |offset, _| {
        calls.fetch_add(1, Ordering::SeqCst);
        match offset {
            0 => Err(VmmError::ZeroSize { what: "test" }),
            _ => Ok(()),
        }
    });
    assert_eq!(refused, Err(VmmError::ZeroSize { what: "test" }));
    assert!(calls.load(Ordering::SeqCst) < 20, "it went on");

    let panicked = catch_unwind(AssertUnwindSafe(|| {
        fixture.fill(0, 4 * UNIT, |_, _| panic!("in `read`"))
    }));
    assert!(panicked.is_err());
    assert_eq!(fixture.store.stats().in_use_bytes, 0);
    fixture
        .fill(0, 4 * UNIT, |_, _| Ok(()))
        .expect("as good as new");
}

#[test]
fn bad_input_is_refused_before_anything_is_read() {
    let fixture = Fixture::new(2);
    let fill = |offset, bytes| {
        fixture
            .simulated
            .unchanged(|| fixture.fill(offset, bytes, |_, _| unreachable!("nothing is to be read")))
    };
    let what = "size";
    assert!(
        matches!(fill(0, 0), Err(VmmError::ZeroSize { .. })),
        "{what}"
    );
    assert!(matches!(
        fill(usize::MAX, 2),
        Err(VmmError::Overflow { .. })
    ));
    assert!(matches!(
        fill(60 * UNIT, 8 * UNIT),
        Err(VmmError::OutOfRange { .. })
    ));
    assert!(matches!(
        fill(19 * UNIT, 2 * UNIT),
        Err(VmmError::NotMapped { .. })
    ));
    let other = Simulated::default();
    let foreign = HostStore::new(&other.device, 8 * UNIT).expect("a store");
    let refused = fixture
        .pool
        .fill(0, UNIT, &foreign, |_, _| Ok::<_, VmmError>(()));
    assert_eq!(refused, Err(VmmError::WrongDriver));
    let small = HostStore::new(&fixture.simulated.device, UNIT).expect("a store");
    let refused = fixture
        .pool
        .fill(0, 2 * UNIT, &small, |_, _| Ok::<_, VmmError>(()));
    let full = VmmError::HostStoreFull {
        needed_bytes: 2 * UNIT,
        in_use_bytes: 0,
        limit_bytes: UNIT,
    };
    assert_eq!(refused, Err(full));
}

/// A copy that is queued while its fence cannot be recorded, and a stream that cannot be waited for:
/// what the device may still read and write stays.
#[test]
fn copies_that_may_still_run_keep_their_memory() {
    let fixture = Fixture::new(1);
    let simulator = &fixture.simulated.simulator;
    simulator.inject(Fault::always(
        DriverFunction::cuEventRecord,
        CUDA_ERROR_OPERATING_SYSTEM,
    ));
    simulator.inject(Fault::always(
        DriverFunction::cuStreamSynchronize,
        CUDA_ERROR_OPERATING_SYSTEM,
    ));
    let refused = fixture
        .pool
        .fill(0, UNIT, &fixture.store, |_, _| Ok::<_, VmmError>(()));
    assert_eq!(
        refused,
        Err(failure!(cuEventRecord, CUDA_ERROR_OPERATING_SYSTEM))
    );
    let device = &fixture.simulated.device;
    assert_eq!(
        fixture.store.stats().in_use_bytes,
        UNIT,
        "the device has it"
    );
    simulator.clear_faults();
    device.synchronize().expect("nothing fails");
    device.retry_quarantine();
    assert_eq!(device.quarantined_host_bytes(), 0);
    assert_eq!(fixture.store.stats().in_use_bytes, 0);
}

#[test]
fn whatever_fails_nothing_is_held_and_it_works_again() {
    for failing in [1, 2] {
        let mut calls = 0;
        for first in 1.. {
            let fixture = Fixture::new(1);
            let simulator = &fixture.simulated.simulator;
            for nth in first..first + failing {
                simulator.inject(Fault::nth_call(nth, CUDA_ERROR_OPERATING_SYSTEM));
            }
            let fill = || {
                let read = |offset: usize, target: &mut [u8]| {
                    write(offset, target);
                    Ok::<_, VmmError>(())
                };
                fixture.pool.fill(UNIT, 6 * UNIT, &fixture.store, read)
            };
            let filled = fill();
            simulator.clear_faults();
            let device = &fixture.simulated.device;
            device.synchronize().expect("nothing fails");
            device.retry_quarantine();
            assert_eq!(device.quarantined_host_bytes(), 0, "call {first}");
            assert_eq!(fixture.store.stats().in_use_bytes, 0, "call {first}");
            assert_eq!(fixture.pool.stats().live_bytes, 20 * UNIT, "call {first}");
            fill().expect("nothing fails");
            assert_eq!(fixture.read(7 * UNIT - 1, 2), [byte(7 * UNIT - 1), 0]);
            if filled.is_ok() {
                calls = first - 1;
                break;
            }
        }
        assert!(calls > 15, "only {calls} calls could fail");
    }
}
