//! Memory that is mapped nowhere and waits to be used again.

use crate::Fixture;
use crate::common::{PAGE, manual};
use cuda_vmm::sim::Fault;
use cuda_vmm::sys::{CUDA_ERROR_OPERATING_SYSTEM, DriverFunction};
use cuda_vmm::{EngineOptions, Stream, VirtualMemoryPool};

fn options() -> EngineOptions {
    manual().limit_bytes(8 * PAGE).cache_bytes_max(4 * PAGE)
}

impl Fixture {
    /// Steps until nothing is retiring or parked any more.
    #[track_caller]
    fn settle(&self) {
        for _ in 0..4 {
            let done = self.simulated.device.synchronize();
            done.expect("nothing is in the way");
            self.engine.step();
        }
        let stats = self.engine.stats();
        assert_eq!(
            (stats.parts.retiring_bytes, stats.parts.parked_bytes),
            (0, 0),
            "{stats}"
        );
    }

    /// The driver calls that `act` makes.
    fn calls(&self, act: impl FnOnce()) -> Vec<DriverFunction> {
        self.simulated.simulator.start_trace();
        act();
        self.simulated.simulator.take_trace()
    }
}

#[test]
fn memory_from_the_cache_is_mapped_without_being_made() {
    let fixture = Fixture::with(options(), 64 * PAGE);
    fixture.pool.allocate(0, 6 * PAGE).expect("room");
    fixture.pool.deallocate(0, 6 * PAGE).expect("live");
    fixture.settle();
    let stats = fixture.engine.stats();
    assert_eq!(
        (stats.parts.cached_bytes, stats.committed_bytes),
        (4 * PAGE, 4 * PAGE),
        "{stats}"
    );
    assert_eq!(fixture.pool.stats().committed_bytes, 0, "on no account");
    let calls = fixture.calls(|| {
        fixture.pool.allocate(32 * PAGE, PAGE).expect("room");
    });
    assert_eq!(
        calls,
        [DriverFunction::cuMemMap, DriverFunction::cuMemSetAccess]
    );
    assert_eq!(fixture.engine.stats().parts.cached_bytes, 3 * PAGE);
}

#[test]
fn no_more_is_overwritten_than_the_cache_has_room_for() {
    let fixture = Fixture::with(options(), 64 * PAGE);
    fixture.pool.allocate(0, 6 * PAGE).expect("room");
    fixture.pool.deallocate(0, 6 * PAGE).expect("live");
    let calls = fixture.calls(|| fixture.settle());
    let zeros = calls
        .iter()
        .filter(|call| **call == DriverFunction::cuMemsetD8Async);
    assert_eq!(zeros.count(), 4);
}

#[test]
fn no_range_finds_another_ones_bytes_in_it() {
    let fixture = Fixture::with(options(), 64 * PAGE);
    let stream = Stream::new(&fixture.simulated.device).expect("a stream");
    fixture.pool.use_stream(&stream).expect("of this device");
    let address = fixture.pool.allocate(0, 2 * PAGE).expect("room");
    // SAFETY: live, and mapped until the stream is past this.
    unsafe { stream.memset(address, 77, 2 * PAGE) }.expect("queued");
    fixture.pool.deallocate(0, 2 * PAGE).expect("live");
    fixture.settle();
    assert_eq!(fixture.engine.stats().parts.cached_bytes, 2 * PAGE);
    let other = VirtualMemoryPool::on_engine(&fixture.engine, 8 * PAGE, PAGE).expect("a pool");
    let address = other.allocate(0, 2 * PAGE).expect("room");
    assert_eq!(
        fixture.engine.stats().parts.cached_bytes,
        0,
        "it is that memory"
    );
    let mut bytes = vec![1; 2 * PAGE];
    // SAFETY: live.
    unsafe { stream.read(address, &mut bytes) }.expect("read");
    assert!(bytes.iter().all(|byte| *byte == 0));
}

#[test]
fn the_cache_is_given_up_before_any_allocation_is_refused() {
    let fixture = Fixture::with(options(), 64 * PAGE);
    fixture.pool.allocate(0, 4 * PAGE).expect("room");
    fixture.pool.deallocate(0, 4 * PAGE).expect("live");
    fixture.settle();
    assert_eq!(fixture.engine.stats().parts.cached_bytes, 4 * PAGE);
    // Of another size, so that nothing in the cache serves it.
    let other = VirtualMemoryPool::on_engine(&fixture.engine, 16 * PAGE, 2 * PAGE).expect("a pool");
    other.allocate(0, 8 * PAGE).expect("the whole budget");
    let stats = fixture.engine.stats();
    assert_eq!(
        (stats.parts.cached_bytes, stats.committed_bytes),
        (0, 8 * PAGE),
        "{stats}"
    );
    let error = fixture
        .pool
        .allocate(0, 1)
        .expect_err("nothing is left to give up");
    assert!(error.is_retryable(), "{error}");
}

#[test]
fn trimming_empties_the_cache_as_far_as_is_asked() {
    let fixture = Fixture::with(options(), 64 * PAGE);
    fixture.pool.allocate(0, 5 * PAGE).expect("room");
    fixture.pool.deallocate(PAGE, 4 * PAGE).expect("live");
    fixture.settle();
    assert_eq!(fixture.engine.trim_to(3 * PAGE), Ok(2 * PAGE));
    assert_eq!(fixture.engine.stats().committed_bytes, 3 * PAGE);
    assert_eq!(fixture.engine.trim(), Ok(2 * PAGE));
    assert_eq!(
        fixture.engine.stats().committed_bytes,
        PAGE,
        "what is live stays"
    );
    assert_eq!(fixture.simulated.books().physical_bytes, PAGE);
}

#[test]
fn what_cannot_be_overwritten_is_not_kept() {
    for refused in [
        DriverFunction::cuStreamCreate,
        DriverFunction::cuMemsetD8Async,
        DriverFunction::cuEventRecord,
    ] {
        let fixture = Fixture::with(options(), 64 * PAGE);
        let stream = Stream::new(&fixture.simulated.device).expect("a stream");
        fixture.pool.use_stream(&stream).expect("of this device");
        fixture.pool.allocate(0, 2 * PAGE).expect("room");
        fixture.pool.deallocate(0, 2 * PAGE).expect("live");
        let fault = Fault::always(refused, CUDA_ERROR_OPERATING_SYSTEM);
        fixture.simulated.simulator.inject(fault);
        fixture.settle();
        let stats = fixture.engine.stats();
        assert_eq!(
            (stats.parts.cached_bytes, stats.committed_bytes),
            (0, 0),
            "{refused}: {stats}"
        );
        assert_eq!(fixture.simulated.books().physical_bytes, 0, "{refused}");
    }
}

#[test]
fn what_the_driver_will_not_take_from_the_cache_is_retried() {
    let fixture = Fixture::with(options(), 64 * PAGE);
    fixture.pool.allocate(0, 2 * PAGE).expect("room");
    fixture.pool.deallocate(0, 2 * PAGE).expect("live");
    fixture.settle();
    let refused = DriverFunction::cuMemRelease;
    fixture
        .simulated
        .simulator
        .inject(Fault::nth_of(refused, 1, CUDA_ERROR_OPERATING_SYSTEM));
    let error = fixture.engine.trim().expect_err("one was refused");
    assert_eq!(error.driver_code(), Some(CUDA_ERROR_OPERATING_SYSTEM));
    let stats = fixture.engine.stats();
    assert_eq!(
        (stats.parts.quarantined_bytes, stats.committed_bytes),
        (PAGE, PAGE),
        "{stats}"
    );
    fixture.engine.step();
    assert_eq!(fixture.engine.stats().committed_bytes, 0);
    assert_eq!(fixture.simulated.books().physical_bytes, 0);
}

#[test]
fn what_is_parked_is_given_back_down_to_three_quarters_of_what_may_be() {
    let fixture = Fixture::with(manual().park_bytes_max(4 * PAGE), 64 * PAGE);
    fixture.pool.allocate(0, 6 * PAGE).expect("room");
    fixture.pool.deallocate(0, 4 * PAGE).expect("live");
    fixture.simulated.device.synchronize().expect("done");
    fixture.engine.step();
    assert_eq!(
        fixture.engine.stats().parts.parked_bytes,
        4 * PAGE,
        "not too much"
    );
    fixture.pool.deallocate(4 * PAGE, PAGE).expect("live");
    fixture.simulated.device.synchronize().expect("done");
    fixture.engine.step();
    assert_eq!(
        fixture.engine.stats().parts.parked_bytes,
        3 * PAGE,
        "too much, by one"
    );
}
