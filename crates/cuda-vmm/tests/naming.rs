//! Streams that are named for a pool, forgotten, and let go: what a free asks, and what it waits
//! for.

mod common;

use common::{Gate, PAGE, Simulated, manual};
use cuda_vmm::sim::Fault;
use cuda_vmm::sys::{CUDA_ERROR_OPERATING_SYSTEM, DriverFunction};
use cuda_vmm::{Engine, Stream, VirtualMemoryPool};
use std::sync::Arc;

struct Fixture {
    pool: VirtualMemoryPool,
    engine: Engine,
    simulated: Simulated,
}

impl Fixture {
    fn new() -> Self {
        let simulated = Simulated::default();
        let engine = Engine::new(&simulated.device, manual()).expect("an engine");
        let pool = VirtualMemoryPool::on_engine(&engine, 16 * PAGE, PAGE).expect("a pool");
        Self {
            pool,
            engine,
            simulated,
        }
    }

    fn stream(&self) -> Stream {
        Stream::new(&self.simulated.device).expect("a stream")
    }

    fn named(&self) -> Stream {
        let stream = self.stream();
        self.pool.use_stream(&stream).expect("of this device");
        stream
    }

    /// Queues a write to the page of this number behind a gate.
    fn write_behind_a_gate(&self, stream: &Stream, page: usize) -> Gate {
        let gate = Gate::close(&self.simulated.device, stream.raw());
        let address = self.pool.base_address() + (page * PAGE) as u64;
        // SAFETY: the page stays mapped until the work has run; that is what is tested.
        unsafe { stream.memset(address, 7, PAGE) }.expect("queued");
        gate
    }

    /// Frees a page; returns how many events that recorded.
    fn free(&self, page: usize) -> u64 {
        let events = || {
            let calls = |function| self.simulated.simulator.calls(function);
            calls(DriverFunction::cuEventRecord) + calls(DriverFunction::cuCtxRecordEvent)
        };
        let before = events();
        self.pool.deallocate(page * PAGE, PAGE).expect("live");
        events() - before
    }

    #[track_caller]
    fn expect_waits(&self) {
        let report = self.engine.step();
        assert_eq!((report.drained_bytes, report.retiring_bytes), (0, PAGE));
    }

    /// Waits for all work; then the freed page goes back, and nothing has touched it meanwhile.
    #[track_caller]
    fn expect_goes_back(&self) {
        self.simulated.device.synchronize().expect("legal work");
        assert_eq!(self.engine.step().drained_bytes, PAGE);
        assert!(!self.simulated.simulator.is_poisoned(0));
    }
}

#[test]
fn streams_that_no_caller_holds_any_more_are_destroyed_and_asked_no_more() {
    let fixture = Fixture::new();
    let before = fixture.simulated.books().streams;
    for requests in [1, 10, 100] {
        for _ in 0..requests {
            drop(fixture.named());
        }
        assert!(fixture.simulated.books().streams <= before + 1);
        fixture.pool.allocate(0, PAGE).expect("room");
        assert_eq!(fixture.free(0), 0, "after {requests} streams");
        assert_eq!(fixture.simulated.books().streams, before);
        fixture.expect_goes_back();
    }
}

#[test]
fn the_last_work_of_a_stream_that_no_caller_holds_any_more_is_waited_for() {
    let fixture = Fixture::new();
    let _other = fixture.named();
    let stream = fixture.named();
    fixture.pool.allocate(0, 2 * PAGE).expect("room");
    let gate = fixture.write_behind_a_gate(&stream, 0);
    drop(stream);
    assert_eq!(fixture.free(0), 2, "its end, and one of the other");
    fixture.expect_waits();
    assert_eq!(fixture.free(1), 1, "its end is known");
    let report = fixture.engine.step();
    assert_eq!((report.drained_bytes, report.retiring_bytes), (0, 2 * PAGE));
    gate.open();
    fixture.simulated.device.synchronize().expect("legal work");
    assert_eq!(fixture.engine.step().drained_bytes, 2 * PAGE);
    assert!(!fixture.simulated.simulator.is_poisoned(0));
    fixture.pool.allocate(0, PAGE).expect("room");
    assert_eq!(fixture.free(0), 1, "of the one that is left");
}

#[test]
fn of_a_forgotten_stream_only_what_was_queued_before_is_waited_for() {
    let fixture = Fixture::new();
    let (_other, stream) = (fixture.named(), fixture.named());
    fixture.pool.allocate(0, PAGE).expect("room");
    let gate = fixture.write_behind_a_gate(&stream, 0);
    fixture.pool.forget_stream(&stream).expect("named");
    fixture.pool.forget_stream(&stream).expect("nothing to do");
    fixture.free(0);
    fixture.expect_waits();
    gate.open();
    fixture.expect_goes_back();
    // What it is given now is none of the pool's.
    let _gate = Gate::close(&fixture.simulated.device, stream.raw());
    fixture.pool.allocate(0, PAGE).expect("room");
    fixture.free(0);
    assert_eq!(fixture.engine.step().drained_bytes, PAGE);
}

#[test]
fn what_is_kept_of_a_forgotten_stream_goes_once_its_work_is_past() {
    let fixture = Fixture::new();
    let (_other, stream) = (fixture.named(), fixture.named());
    fixture.pool.allocate(0, PAGE).expect("room");
    let before = fixture.simulated.books().events;
    let gate = fixture.write_behind_a_gate(&stream, 0);
    fixture.pool.forget_stream(&stream).expect("named");
    assert_eq!(fixture.simulated.books().events, before + 1);
    gate.open();
    stream.synchronize().expect("legal work");
    fixture.free(0);
    fixture.expect_goes_back();
    assert_eq!(fixture.simulated.books().events, before);
}

#[test]
fn the_end_of_a_forgotten_stream_that_cannot_be_asked_for_is_waited_for_alone() {
    let fixture = Fixture::new();
    let (_other, stream, unnamed) = (fixture.named(), fixture.named(), fixture.stream());
    fixture.pool.allocate(0, PAGE).expect("room");
    let gate = fixture.write_behind_a_gate(&stream, 0);
    fixture.pool.forget_stream(&stream).expect("named");
    // Work that is none of the pool's.
    let _other_gate = Gate::close(&fixture.simulated.device, unnamed.raw());
    let refused = Fault::nth_of(DriverFunction::cuEventQuery, 1, CUDA_ERROR_OPERATING_SYSTEM);
    fixture.simulated.simulator.inject(refused);
    fixture.free(0);
    fixture.expect_waits();
    gate.open();
    stream.synchronize().expect("legal work");
    assert_eq!(fixture.engine.step().drained_bytes, PAGE);
}

#[test]
fn once_no_stream_is_named_all_work_of_the_context_is_waited_for_again() {
    let fixture = Fixture::new();
    let (named, unnamed) = (fixture.named(), fixture.stream());
    fixture.pool.forget_stream(&named).expect("named");
    fixture.pool.allocate(0, PAGE).expect("room");
    let gate = fixture.write_behind_a_gate(&unnamed, 0);
    fixture.free(0);
    fixture.expect_waits();
    gate.open();
    fixture.expect_goes_back();
}

#[test]
fn forgetting_the_per_thread_stream_leaves_no_thread_out() {
    let fixture = Fixture::new();
    let _named = fixture.named();
    // SAFETY: the per-thread default stream is always there.
    let per_thread = unsafe {
        let handle = core::ptr::without_provenance_mut(2);
        Stream::borrow(&fixture.simulated.device, handle)
    };
    fixture.pool.use_stream(&per_thread).expect("this device's");
    fixture.pool.allocate(0, PAGE).expect("room");
    let gate = std::thread::scope(|scope| {
        let write = scope.spawn(|| fixture.write_behind_a_gate(&per_thread, 0));
        write.join().expect("queued")
    });
    fixture.pool.forget_stream(&per_thread).expect("named");
    fixture.free(0);
    fixture.expect_waits();
    gate.open();
    fixture.expect_goes_back();
}

#[test]
fn of_many_streams_those_with_work_are_waited_for_by_one_event_each() {
    let fixture = Fixture::new();
    let streams: Vec<_> = (0..20).map(|_| fixture.named()).collect();
    fixture.pool.allocate(0, PAGE).expect("room");
    let gates = [&streams[3], &streams[17]].map(|stream| {
        // The second write would be refused under the first's, so only one writes.
        Gate::close(&fixture.simulated.device, stream.raw())
    });
    assert_eq!(fixture.free(0), 2);
    for gate in &gates {
        fixture.expect_waits();
        gate.open();
        gate.wait_until_reached();
    }
    fixture.expect_goes_back();
}

#[test]
fn memory_is_taken_back_behind_the_last_work_of_a_stream_that_is_gone() {
    let fixture = Fixture::new();
    let (other, stream) = (fixture.named(), fixture.named());
    fixture.pool.allocate(0, PAGE).expect("room");
    let gate = fixture.write_behind_a_gate(&stream, 0);
    drop(stream);
    fixture.free(0);
    // At once: the stream that is left waits, and so does one that comes later.
    let address = fixture.pool.try_allocate(0, PAGE).expect("taken back");
    let later = fixture.named();
    for (stream, byte) in [(&other, 8), (&later, 9)] {
        // SAFETY: the page is live.
        unsafe { stream.memset(address, byte, PAGE) }.expect("queued");
        let mark = stream.record().expect("recorded");
        assert!(!mark.is_complete().expect("asked"), "behind the gate");
    }
    // Freed again, it still waits for all of them.
    fixture.free(0);
    fixture.expect_waits();
    gate.open();
    fixture.expect_goes_back();
}

#[test]
fn a_borrowed_stream_keeps_its_owner_until_no_pool_asks_it_any_more() {
    struct Owner(#[allow(dead_code, reason = "held")] Stream);
    let fixture = Fixture::new();
    let before = fixture.simulated.books().streams;
    let owner = Arc::new(Owner(fixture.stream()));
    let raw = owner.0.raw();
    let watch = Arc::downgrade(&owner);
    // SAFETY: the owner holds the stream.
    let stream = unsafe { Stream::borrow_with(&fixture.simulated.device, raw, owner) };
    fixture.pool.use_stream(&stream).expect("of this device");
    drop(stream);
    fixture.pool.allocate(0, PAGE).expect("room");
    assert_eq!(fixture.free(0), 1, "others may hold it, so it is asked");
    assert_eq!(fixture.simulated.books().streams, before + 1);
    let Fixture {
        pool,
        engine,
        simulated,
    } = fixture;
    drop(pool);
    assert!(watch.upgrade().is_none(), "the pool was the last");
    assert_eq!(simulated.books().streams, before);
    drop(engine);
}

#[test]
fn streams_that_are_named_and_dropped_without_a_free_do_not_pile_up() {
    let fixture = Fixture::new();
    let before = fixture.simulated.books().streams;
    let gates: Vec<_> = (0..50)
        .map(|_| {
            let stream = fixture.named();
            Gate::close(&fixture.simulated.device, stream.raw())
        })
        .collect();
    assert!(fixture.simulated.books().streams <= before + 1);
    fixture.pool.allocate(0, PAGE).expect("room");
    fixture.free(0);
    fixture.expect_waits();
    drop(gates);
    fixture.expect_goes_back();
}
