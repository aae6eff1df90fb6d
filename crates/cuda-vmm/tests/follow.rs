//! Memory that is taken back before the device has finished with it: streams wait for it, callers
//! do not.
//!
//! A declared capture is the whole process's, so these tests take turns.

mod common;

use common::{PAGE, Simulated, manual, with_context};
use cuda_vmm::sim::{Books, Fault, Simulator};
use cuda_vmm::sys::{
    CU_STREAM_CAPTURE_MODE_GLOBAL, CU_STREAM_CAPTURE_MODE_RELAXED, CUDA_ERROR_OUT_OF_MEMORY,
    CUDA_ERROR_UNKNOWN, CUDA_SUCCESS, DriverFunction,
};
use cuda_vmm::{CaptureGuard, Engine, Stream, VirtualMemoryPool};
use std::sync::{Mutex, MutexGuard, PoisonError};

static TURN: Mutex<()> = Mutex::new(());

/// Lets queued work run, so that a test that fails does not hang.
struct Held(Simulator);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.release_work();
    }
}

struct Fixture {
    // First of all.
    _held: Held,
    pool: VirtualMemoryPool,
    engine: Engine,
    streams: Vec<Stream>,
    simulated: Simulated,
    _turn: MutexGuard<'static, ()>,
}

impl Fixture {
    /// A page that was freed while a write to it waits to be run on the first of so many named
    /// streams.
    fn freed_under_a_write(named: usize) -> Self {
        Self::freed_pages(named, 1)
    }

    /// The same with so many pages, which are freed by one call.
    fn freed_pages(named: usize, pages: usize) -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let simulated = Simulated::default();
        let engine =
            Engine::new(&simulated.device, manual().limit_bytes(4 * PAGE)).expect("an engine");
        let pool = VirtualMemoryPool::on_engine(&engine, 8 * PAGE, PAGE).expect("a pool");
        let stream = || Stream::new(&simulated.device).expect("a stream");
        let streams: Vec<_> = std::iter::repeat_with(stream).take(named.max(1)).collect();
        let fixture = Self {
            _held: Held(simulated.simulator.clone()),
            pool,
            engine,
            streams,
            simulated,
            _turn: turn,
        };
        fixture.simulated.simulator.hold_work();
        for page in 0..pages {
            fixture.pool.allocate(page * PAGE, PAGE).expect("room");
        }
        for stream in fixture.streams.iter().take(named) {
            fixture.pool.use_stream(stream).expect("same device");
        }
        fixture.write(0, 7);
        fixture.pool.deallocate(0, pages * PAGE).expect("live");
        fixture
    }

    /// Queues a write to the first page.
    fn write(&self, stream: usize, value: u8) {
        // SAFETY: the page stays mapped until the work has run; that is what is tested.
        unsafe { self.streams[stream].memset(self.pool.base_address(), value, PAGE) }
            .expect("queued");
    }

    /// What is in the first page when all is done.
    fn read(&self) -> u8 {
        self.simulated.simulator.release_work();
        for stream in &self.streams {
            stream.synchronize().expect("all work was legal");
        }
        let mut byte = [0];
        // SAFETY: the page is live, and nothing runs on it.
        unsafe { self.streams[0].read(self.pool.base_address(), &mut byte) }.expect("mapped");
        byte[0]
    }

    /// What the driver is asked while something is done.
    fn calls(&self, act: impl FnOnce()) -> Vec<DriverFunction> {
        self.simulated.simulator.start_trace();
        act();
        self.simulated.simulator.take_trace()
    }

    fn take(&self) -> Result<u64, cuda_vmm::VmmError> {
        let taken = self.pool.try_allocate(0, PAGE);
        let stats = self.engine.stats();
        assert_eq!(stats.parts.total_bytes(), stats.committed_bytes, "{stats}");
        let expected = if taken.is_ok() { (PAGE, 0) } else { (0, PAGE) };
        assert_eq!(
            (stats.parts.live_page_bytes, stats.parts.retiring_bytes),
            expected
        );
        taken
    }

    fn refused(&self) {
        let error = self.take().expect_err("the device may still use it");
        assert!(error.is_retryable(), "{error}");
    }
}

fn waits(calls: &[DriverFunction]) -> usize {
    let wait = |call: &&DriverFunction| **call == DriverFunction::cuStreamWaitEvent;
    calls.iter().filter(wait).count()
}

#[test]
fn on_the_same_stream_no_call_is_made() {
    let fixture = Fixture::freed_under_a_write(1);
    let calls = fixture.calls(|| assert!(fixture.take().is_ok()));
    assert_eq!(calls, []);
    fixture.write(0, 9);
    assert_eq!(fixture.read(), 9);
    assert_eq!(fixture.engine.step().retired_bytes, 0, "it is live");
}

#[test]
fn other_streams_are_made_to_wait() {
    let fixture = Fixture::freed_under_a_write(3);
    let calls = fixture.calls(|| assert!(fixture.take().is_ok()));
    assert_eq!(
        waits(&calls),
        2,
        "for the first, as they were idle themselves"
    );
    let blocking = [
        DriverFunction::cuEventSynchronize,
        DriverFunction::cuCtxSynchronize,
    ];
    assert!(
        !calls.iter().any(|call| blocking.contains(call)),
        "{calls:?}"
    );
    // One of them cannot get past what the first has still to do.
    fixture.write(2, 9);
    assert_eq!(fixture.read(), 9);
}

#[test]
fn a_chunk_that_is_freed_again_waits_for_the_old_work_too() {
    for streams in [1, 2] {
        let fixture = Fixture::freed_under_a_write(streams);
        fixture.take().expect("at once");
        fixture.write(streams - 1, 9);
        fixture.pool.deallocate(0, PAGE).expect("live");
        assert_eq!(fixture.engine.step().drained_bytes, 0);
        fixture.take().expect("and once more");
        fixture.pool.deallocate(0, PAGE).expect("live");
        assert_eq!(fixture.engine.step().drained_bytes, 0);
        fixture.simulated.simulator.release_work();
        fixture
            .streams
            .iter()
            .for_each(|stream| stream.synchronize().expect("legal"));
        assert_eq!(fixture.engine.step().drained_bytes, PAGE);
        assert!(!fixture.simulated.simulator.is_poisoned(0));
    }
}

#[test]
fn a_stream_that_is_named_later_waits_as_well() {
    let mut fixture = Fixture::freed_under_a_write(1);
    fixture.take().expect("at once");
    let late = Stream::new(&fixture.simulated.device).expect("a stream");
    let calls = fixture.calls(|| fixture.pool.use_stream(&late).expect("same device"));
    assert_eq!(waits(&calls), 1);
    let calls = fixture.calls(|| fixture.pool.use_stream(&late).expect("known"));
    assert_eq!(calls, []);
    fixture.streams.push(late);
    fixture.write(1, 9);
    assert_eq!(fixture.read(), 9);
    // It has nothing to wait for when all that is past.
    fixture.engine.step();
    let later = Stream::new(&fixture.simulated.device).expect("a stream");
    assert_eq!(
        fixture.calls(|| fixture.pool.use_stream(&later).expect("same device")),
        []
    );
}

#[test]
fn a_stream_that_is_named_later_is_not_made_to_wait_twice() {
    let fixture = Fixture::freed_pages(2, 2);
    fixture.pool.try_allocate(0, PAGE).expect("at once");
    let late = Stream::new(&fixture.simulated.device).expect("a stream");
    let calls = fixture.calls(|| fixture.pool.use_stream(&late).expect("same device"));
    assert_eq!(waits(&calls), 1);
    // The other page was freed by the same call, behind the same work.
    let calls = fixture.calls(|| _ = fixture.pool.try_allocate(PAGE, PAGE).expect("at once"));
    assert_eq!(calls, []);
}

/// The stream of each thread is another one, and a captured one waits for nothing outside.
#[test]
fn the_caller_waits_where_a_stream_that_is_named_later_cannot() {
    let fixture = Fixture::freed_under_a_write(1);
    fixture.take().expect("at once");
    let device = &fixture.simulated.device;
    let captured = Stream::new(device).expect("a stream");
    // SAFETY: the per-thread default stream is always there.
    let per_thread = unsafe { Stream::borrow(device, core::ptr::without_provenance_mut(2)) };
    let table = *device.driver().table();
    with_context(device, || {
        // SAFETY: the stream is alive.
        let code =
            unsafe { (table.cuStreamBeginCapture)(captured.raw(), CU_STREAM_CAPTURE_MODE_RELAXED) };
        assert_eq!(code, CUDA_SUCCESS);
    });
    std::thread::scope(|scope| {
        let waiting =
            [&captured, &per_thread].map(|stream| scope.spawn(|| fixture.pool.use_stream(stream)));
        // Time for it to go wrong in.
        std::thread::sleep(std::time::Duration::from_millis(30));
        let is_done = waiting.each_ref().map(|thread| thread.is_finished());
        fixture.simulated.simulator.release_work();
        assert_eq!(is_done, [false, false]);
        for thread in waiting {
            assert_eq!(thread.join().expect("no panic"), Ok(()));
        }
    });
    with_context(device, || {
        let mut graph = core::ptr::null_mut();
        // SAFETY: the stream is alive and `graph` a valid place; the graph is destroyed once.
        unsafe {
            let code = (table.cuStreamEndCapture)(captured.raw(), &mut graph);
            assert_eq!(code, CUDA_SUCCESS, "intact");
            assert_eq!((table.cuGraphDestroy)(graph), CUDA_SUCCESS);
        }
    });
}

#[test]
fn where_no_stream_was_named_the_caller_waits_until_one_is() {
    let fixture = Fixture::freed_under_a_write(0);
    fixture.refused();
    fixture
        .pool
        .use_stream(&fixture.streams[0])
        .expect("same device");
    assert_eq!(
        waits(&fixture.calls(|| assert!(fixture.take().is_ok()))),
        1,
        "for the context"
    );
    fixture.write(0, 9);
    assert_eq!(fixture.read(), 9);
}

#[test]
fn while_a_capture_is_declared_the_caller_waits() {
    let fixture = Fixture::freed_under_a_write(1);
    let capture = CaptureGuard::new();
    fixture.refused();
    drop(capture);
    fixture.take().expect("at once");
}

/// It could be one of these streams' capture, which an event of another would end.
#[test]
fn while_a_capture_is_declared_no_stream_is_made_to_wait() {
    let fixture = Fixture::freed_under_a_write(2);
    let waits = || {
        let simulator = &fixture.simulated.simulator;
        simulator.calls(DriverFunction::cuStreamWaitEvent)
    };
    let before = waits();
    let capture = CaptureGuard::new();
    fixture.refused();
    assert_eq!(waits(), before);
    drop(capture);
    fixture.take().expect("at once");
    assert!(waits() > before);
}

#[test]
fn a_stream_that_is_captured_is_not_made_to_wait() {
    let fixture = Fixture::freed_under_a_write(2);
    let captured = &fixture.streams[1];
    let table = *fixture.simulated.device.driver().table();
    with_context(&fixture.simulated.device, || {
        let mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
        // SAFETY: the stream is alive.
        let code = unsafe { (table.cuStreamBeginCapture)(captured.raw(), mode) };
        assert_eq!(code, CUDA_SUCCESS);
    });
    fixture.refused();
    with_context(&fixture.simulated.device, || {
        let mut graph = core::ptr::null_mut();
        // SAFETY: the stream is alive and `graph` a valid place; the graph is destroyed once.
        unsafe {
            assert_eq!(
                (table.cuStreamEndCapture)(captured.raw(), &mut graph),
                CUDA_SUCCESS,
                "intact"
            );
            assert_eq!((table.cuGraphDestroy)(graph), CUDA_SUCCESS);
        }
    });
    fixture.take().expect("at once");
}

#[test]
fn a_call_that_fails_leaves_it_retiring() {
    use DriverFunction::{cuCtxSetCurrent, cuEventQuery, cuStreamIsCapturing, cuStreamWaitEvent};
    let fixture = Fixture::freed_under_a_write(2);
    let simulator = &fixture.simulated.simulator;
    for call in [
        cuEventQuery,
        cuStreamIsCapturing,
        cuStreamWaitEvent,
        cuCtxSetCurrent,
    ] {
        for nth in 1..=2 {
            simulator.inject(Fault::nth_of(call, nth, CUDA_ERROR_UNKNOWN));
            simulator.inject(Fault::always(cuStreamWaitEvent, CUDA_ERROR_UNKNOWN));
            fixture.refused();
            simulator.clear_faults();
        }
    }
    fixture.take().expect("nothing fails any more");
    fixture.write(1, 9);
    assert_eq!(fixture.read(), 9);
}

#[test]
fn an_allocation_that_fails_leaves_retiring_what_it_would_have_taken() {
    let fixture = Fixture::freed_under_a_write(1);
    let simulator = &fixture.simulated.simulator;
    simulator.inject(Fault::always(
        DriverFunction::cuMemCreate,
        CUDA_ERROR_OUT_OF_MEMORY,
    ));
    let error = fixture
        .pool
        .try_allocate(0, 2 * PAGE)
        .expect_err("no memory");
    assert!(error.is_out_of_memory(), "{error}");
    assert_eq!(fixture.engine.stats().parts.retiring_bytes, PAGE);
    assert_eq!(
        fixture.engine.step().drained_bytes,
        0,
        "the write has not run"
    );
    simulator.clear_faults();
    fixture.pool.try_allocate(0, 2 * PAGE).expect("room");
    fixture.write(0, 9);
    assert_eq!(fixture.read(), 9);
}

#[test]
fn events_do_not_pile_up_if_no_thread_takes_steps() {
    let fixture = Fixture::freed_under_a_write(1);
    fixture.simulated.simulator.release_work();
    for _ in 0..1_000 {
        fixture.take().expect("at once");
        fixture.streams[0].synchronize().expect("idle");
        fixture.pool.deallocate(0, PAGE).expect("live");
    }
    let events = fixture.simulated.simulator.books(0).events;
    assert!(events < 100, "{events}");
    let Fixture {
        pool,
        engine,
        streams,
        simulated,
        ..
    } = fixture;
    drop((pool, engine, streams));
    let simulator = simulated.simulator.clone();
    drop(simulated);
    assert_eq!(simulator.books(0), Books::default());
}
