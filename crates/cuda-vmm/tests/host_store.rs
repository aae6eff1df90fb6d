//! The host store: what it pins, keeps and gives back, and what its bytes hold.

#[path = "host_store/bad_input.rs"]
mod bad_input;
mod common;
#[path = "host_store/faults.rs"]
mod faults;
#[path = "host_store/threads.rs"]
mod threads;

use common::{Simulated, failure};
use cuda_vmm::sim::SimConfig;
use cuda_vmm::sys::DriverFunction;
use cuda_vmm::{HostBytes, HostStore, HostStoreOptions, HostStoreStats};

/// The unit of a store's sizes.
const UNIT: usize = 2 << 20;

/// A store with pieces of two units.
struct Fixture {
    store: HostStore,
    simulated: Simulated,
}

impl Fixture {
    fn new(limit_units: usize) -> Self {
        let simulated = Simulated::default();
        let options = HostStoreOptions::new().piece_bytes(2 * UNIT).threads(2);
        let store = HostStore::with_options(&simulated.device, limit_units * UNIT, options);
        Self {
            store: store.expect("a store"),
            simulated,
        }
    }

    #[track_caller]
    fn reserve(&self, units: usize) -> HostBytes {
        self.store.reserve(units * UNIT).expect("room")
    }

    /// Fails unless the store has this many units in use and registered in this many pieces, and
    /// the driver knows of as many.
    #[track_caller]
    fn expect(&self, in_use: usize, registered: usize, pieces: usize) {
        let HostStoreStats {
            in_use_bytes,
            registered_bytes,
            pieces: registered_pieces,
            ..
        } = self.store.stats();
        let found = (in_use_bytes, registered_bytes, registered_pieces);
        assert_eq!(found, (in_use * UNIT, registered * UNIT, pieces));
        let books = self.simulated.books();
        let found = (books.host_registered_bytes, books.host_registrations);
        assert_eq!(found, (registered * UNIT, pieces), "the driver's books");
    }

    fn calls(&self, function: DriverFunction) -> u64 {
        self.simulated.simulator.calls(function)
    }
}

/// Bytes that say where they are.
fn pattern(bytes: usize, seed: usize) -> Vec<u8> {
    let byte = |at: usize| (at.wrapping_mul(31) ^ (at >> 12) ^ seed) as u8;
    (0..bytes).map(byte).collect()
}

#[track_caller]
fn expect_bytes(bytes: &HostBytes, expected: &[u8]) {
    let mut found = vec![0; expected.len()];
    bytes.read(0, &mut found).expect("within");
    assert!(found == expected, "other bytes");
}

#[test]
fn memory_is_pinned_when_it_is_first_reserved_and_kept_for_the_next() {
    let fixture = Fixture::new(8);
    fixture.simulated.unchanged(|| {
        fixture.expect(0, 0, 0);
        let first = fixture.reserve(1);
        fixture.expect(1, 2, 1);
        // The rest of the piece is there already.
        let second = fixture.reserve(1);
        fixture.expect(2, 2, 1);
        let third = fixture.reserve(3);
        fixture.expect(5, 6, 3);
        assert_eq!(fixture.calls(DriverFunction::cuMemHostRegister), 3);
        drop((first, second, third));
        fixture.expect(0, 6, 3);
        let all = fixture.reserve(6);
        assert_eq!(all.reserved_bytes(), 6 * UNIT);
        assert_eq!(fixture.calls(DriverFunction::cuMemHostRegister), 3);
        drop(all);
        assert_eq!(fixture.store.trim(), Ok(6 * UNIT));
    });
    fixture.expect(0, 0, 0);
}

#[test]
fn a_trim_gives_back_the_pieces_of_which_nothing_is_in_use() {
    let fixture = Fixture::new(8);
    let kept = [(); 4].map(|()| fixture.reserve(1));
    let [first, second, third, fourth] = kept;
    assert_eq!(fixture.store.trim(), Ok(0));
    drop((first, third, fourth));
    fixture.expect(1, 4, 2);
    assert_eq!(fixture.store.trim(), Ok(2 * UNIT));
    fixture.expect(1, 2, 1);
    drop(second);
    assert_eq!(fixture.store.trim(), Ok(2 * UNIT));
    assert_eq!(fixture.store.trim(), Ok(0));
    fixture.expect(0, 0, 0);
}

#[test]
fn the_last_piece_is_as_small_as_the_limit_asks() {
    let fixture = Fixture::new(3);
    let all = fixture.reserve(3);
    fixture.expect(3, 3, 2);
    drop(all);
    // A limit between two units is the lower one.
    fixture.store.set_limit_bytes(4 * UNIT - 1).expect("here");
    assert_eq!(fixture.store.stats().limit_bytes, 3 * UNIT);
    assert_eq!(fixture.store.stats().available_bytes(), 3 * UNIT);
}

#[test]
fn bytes_keep_what_is_written_in_one_extent_or_in_several() {
    let fixture = Fixture::new(6);
    let [first, second, third, fourth] = [(); 4].map(|()| fixture.reserve(1));
    drop((first, third));
    // Two extents of one unit, and one of two units in a new piece.
    let size = 4 * UNIT - 100;
    let mut scattered = fixture.store.reserve(size).expect("room");
    fixture.expect(6, 6, 3);
    assert_eq!(scattered.extents(), 3);
    assert_eq!(
        (scattered.bytes(), scattered.reserved_bytes()),
        (size, 4 * UNIT)
    );
    let (mut left, mut right) = (second, fourth);
    let ones = vec![1; UNIT];
    left.write(0, &ones).expect("within");
    right.write(0, &ones).expect("within");
    let mut expected = pattern(size, 7);
    scattered.write(0, &expected).expect("within");
    expect_bytes(&scattered, &expected);
    // Across the edge of two extents, and nothing beside it.
    scattered.write(UNIT - 3, &[9; 7]).expect("within");
    expected[UNIT - 3..UNIT + 4].fill(9);
    expect_bytes(&scattered, &expected);
    let mut across = [0; 9];
    scattered.read(UNIT - 4, &mut across).expect("within");
    assert_eq!(across, expected[UNIT - 4..UNIT + 5]);
    let mut last = [0; 1];
    scattered.read(size - 1, &mut last).expect("within");
    assert_eq!(last[0], expected[size - 1]);
    // Neighbours are untouched.
    expect_bytes(&left, &ones);
    expect_bytes(&right, &ones);
    // No bytes are no copy.
    scattered.write(size, &[]).expect("within");
    scattered.read(0, &mut []).expect("within");
}

#[test]
fn a_lowered_limit_is_kept_as_bytes_are_given_back() {
    let fixture = Fixture::new(8);
    let (first, second) = (fixture.reserve(2), fixture.reserve(2));
    drop(fixture.reserve(4));
    fixture.expect(4, 8, 4);
    // What is free goes at once, as far as the limit asks.
    fixture.store.set_limit_bytes(6 * UNIT).expect("here");
    fixture.expect(4, 6, 3);
    fixture.store.set_limit_bytes(UNIT).expect("here");
    fixture.expect(4, 4, 2);
    assert_eq!(fixture.store.stats().available_bytes(), 0);
    fixture.store.reserve(1).expect_err("above the limit");
    drop(second);
    fixture.expect(2, 2, 1);
    // A piece is given back whole, so less than the limit is left.
    drop(first);
    fixture.expect(0, 0, 0);
    fixture.store.set_limit_bytes(8 * UNIT).expect("here");
    fixture.reserve(8);
}

#[test]
fn reserved_bytes_outlive_the_store_and_all_goes_with_the_last() {
    let fixture = Fixture::new(4);
    let Fixture { store, simulated } = fixture;
    let mut bytes = store.reserve(UNIT).expect("room");
    drop(store);
    bytes.write(0, b"still here").expect("within");
    assert_eq!(simulated.books().host_registered_bytes, 2 * UNIT);
    drop(bytes);
    assert_eq!(simulated.books().host_registered_bytes, 0);
}

#[test]
fn no_memory_of_the_device_is_taken_and_the_context_of_the_thread_stays() {
    let simulated = Simulated::new(SimConfig::new().devices(2));
    let other = simulated.driver.device(1).expect("the second device");
    let store = HostStore::new(&other, 4 * UNIT).expect("a store");
    common::with_context(&simulated.device, || {
        let bytes = store.reserve(UNIT).expect("room");
        let mut current = core::ptr::null_mut();
        // SAFETY: the place is valid.
        let code = unsafe { (simulated.driver.table().cuCtxGetCurrent)(&mut current) };
        assert_eq!((code, current), (0, simulated.device.raw_context()));
        assert_eq!(simulated.simulator.books(1).host_registered_bytes, 4 * UNIT);
        assert_eq!(simulated.simulator.books(1).physical_bytes, 0);
        assert_eq!(simulated.books().host_registered_bytes, 0);
        drop(bytes);
    });
    assert_eq!(store.device(), &other);
    assert_eq!(store.options(), HostStoreOptions::default());
}

#[test]
fn a_capture_of_another_thread_survives() {
    let fixture = Fixture::new(4);
    let device = &fixture.simulated.device;
    let stream = cuda_vmm::Stream::new(device).expect("a stream");
    let table = *device.driver().table();
    common::with_context(device, || {
        let mode = cuda_vmm::sys::CU_STREAM_CAPTURE_MODE_GLOBAL;
        // SAFETY: the stream is alive.
        let code = unsafe { (table.cuStreamBeginCapture)(stream.raw(), mode) };
        assert_eq!(code, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                drop(fixture.reserve(3));
                fixture.store.trim().expect("nothing is in use");
            });
        });
        drop(fixture.reserve(1));
        let mut graph = core::ptr::null_mut();
        // SAFETY: the stream is being captured, and the graph is destroyed once.
        let codes = unsafe {
            let ended = (table.cuStreamEndCapture)(stream.raw(), &mut graph);
            [ended, (table.cuGraphDestroy)(graph)]
        };
        assert_eq!(codes, [0, 0], "the capture was killed");
    });
}

#[test]
fn the_numbers_read_as_a_line() {
    let fixture = Fixture::new(8);
    let _bytes = fixture.reserve(1);
    let stats = fixture.store.stats();
    assert_eq!(stats.free_bytes(), UNIT);
    assert_eq!(
        stats.to_string(),
        "host store: 2 MiB in use of 4 MiB registered in 1 pieces, limit 16 MiB"
    );
}
