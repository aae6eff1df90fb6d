//! What happens, and what does not, while a capture is declared or under way.
//!
//! A declared capture is the whole process's, so these tests take turns.

mod common;

use common::{PAGE, Simulated, manual, with_context};
use cuda_vmm::sim::{Fault, SimConfig, Simulator};
use cuda_vmm::sys::{
    CU_STREAM_CAPTURE_MODE_GLOBAL, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, CUDA_ERROR_ILLEGAL_ADDRESS,
    CUDA_ERROR_NOT_READY, CUDA_SUCCESS, CUevent, CUresult, CUstream, CUstreamCaptureMode,
    DriverFunction, DriverTable,
};
use cuda_vmm::{
    CaptureGuard, Device, Driver, DriverKind, Engine, Stream, VirtualMemoryPool, VmmError,
};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn begin(stream: &Stream, mode: CUstreamCaptureMode) {
    with_context(stream.device(), || {
        // SAFETY: the stream is alive.
        let code =
            unsafe { (stream.device().driver().table().cuStreamBeginCapture)(stream.raw(), mode) };
        assert_eq!(code, CUDA_SUCCESS, "cuStreamBeginCapture");
    });
}

/// Ends the capture, which must be intact, and throws its graph away.
#[track_caller]
fn end(stream: &Stream) {
    let table = *stream.device().driver().table();
    with_context(stream.device(), || {
        let mut graph = core::ptr::null_mut();
        // SAFETY: the stream is alive and `graph` a valid place for the answer.
        let code = unsafe { (table.cuStreamEndCapture)(stream.raw(), &mut graph) };
        assert_eq!(code, CUDA_SUCCESS, "the capture was killed");
        // SAFETY: the graph was just made and is destroyed once.
        assert_eq!(unsafe { (table.cuGraphDestroy)(graph) }, CUDA_SUCCESS);
    });
}

fn pool(device: &Device) -> (Engine, VirtualMemoryPool) {
    let engine = Engine::new(device, manual()).expect("an engine");
    let pool = VirtualMemoryPool::on_engine(&engine, 8 * PAGE, PAGE).expect("a pool");
    (engine, pool)
}

#[test]
fn a_context_synchronise_waits_for_the_end_of_every_declared_capture() {
    let _turn = turn();
    let simulated = Simulated::default();
    let simulator = &simulated.simulator;
    let synchronised = || simulator.calls(DriverFunction::cuCtxSynchronize);
    let guards = [CaptureGuard::new(), CaptureGuard::default()];
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| simulated.device.synchronize());
        for guard in guards {
            // Time for it to go wrong in.
            std::thread::sleep(Duration::from_millis(30));
            assert_eq!(synchronised(), 0);
            assert!(!waiting.is_finished());
            drop(guard);
        }
        let outcome = waiting.join().expect("no panic");
        assert_eq!(outcome, Ok(()));
    });
    assert_eq!(synchronised(), 1);
}

#[test]
fn a_capture_cannot_be_declared_while_a_context_synchronise_is_under_way() {
    let _turn = turn();
    let simulated = Simulated::default();
    let simulator = &simulated.simulator;
    let stream = Stream::new(&simulated.device).expect("a stream");
    let gate = common::Gate::close(&simulated.device, stream.raw());
    std::thread::scope(|scope| {
        // In here, so that a failure opens it before the scope waits for its threads.
        let gate = gate;
        let waiting = scope.spawn(|| simulated.device.synchronize());
        while simulator.calls(DriverFunction::cuCtxSynchronize) == 0 {
            std::thread::yield_now();
        }
        let declared = scope.spawn(|| drop(CaptureGuard::new()));
        std::thread::sleep(Duration::from_millis(30));
        assert!(!declared.is_finished(), "the synchronise would kill it");
        gate.open();
        assert_eq!(waiting.join().expect("no panic"), Ok(()));
        declared.join().expect("no panic");
    });
}

#[test]
fn memory_without_a_stream_is_given_back_after_the_capture_and_not_before() {
    let _turn = turn();
    // With and without `cuCtxRecordEvent`, which kills captures too.
    for version in [13000, 12040] {
        let simulated = Simulated::new(SimConfig::new().driver_version(version));
        let stream = Stream::new(&simulated.device).expect("a stream");
        simulated.unchanged(|| {
            let (engine, pool) = pool(&simulated.device);
            pool.allocate(0, 2 * PAGE).expect("room");
            let guard = CaptureGuard::new();
            begin(&stream, CU_STREAM_CAPTURE_MODE_GLOBAL);
            pool.deallocate(0, 2 * PAGE).expect("live");
            let report = engine.step();
            assert_eq!((report.retired_bytes, report.retiring_bytes), (0, 2 * PAGE));
            assert_eq!(engine.trim(), Ok(0));
            pool.allocate(4 * PAGE, PAGE)
                .expect("the calls of growth disturb no capture");
            let error = pool.allocate(0, PAGE).expect_err("nothing may wait now");
            assert!(error.is_retryable(), "{error}");
            end(&stream);
            drop(guard);
            assert_eq!(engine.step().drained_bytes, 2 * PAGE);
            assert_eq!(engine.stats().committed_bytes, PAGE);
            drop((pool, engine));
        });
    }
}

#[test]
fn memory_with_a_stream_is_given_back_during_the_capture_of_another() {
    let _turn = turn();
    for mode in [
        CU_STREAM_CAPTURE_MODE_GLOBAL,
        CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
    ] {
        let simulated = Simulated::default();
        let [captured, user] = [(), ()].map(|()| Stream::new(&simulated.device).expect("a stream"));
        simulated.unchanged(|| {
            let (engine, pool) = pool(&simulated.device);
            pool.use_stream(&user).expect("of this device");
            let address = pool.allocate(0, 2 * PAGE).expect("room");
            // SAFETY: the memory is live until it is deallocated, and the work is waited for.
            unsafe { user.memset(address, 1, 2 * PAGE) }.expect("queued");
            let guard = CaptureGuard::new();
            // The capture is another thread's: this one asks and waits meanwhile.
            std::thread::scope(|scope| {
                let (began, wait) = std::sync::mpsc::channel();
                let (done, until) = std::sync::mpsc::channel::<()>();
                let captured = &captured;
                let capturing = scope.spawn(move || {
                    begin(captured, mode);
                    began.send(()).expect("the other side waits");
                    let _ = until.recv();
                    end(captured);
                });
                wait.recv().expect("the capture began");
                pool.deallocate(0, 2 * PAGE).expect("live");
                user.synchronize().expect("done");
                assert_eq!(engine.step().drained_bytes, 2 * PAGE);
                drop(done);
                capturing.join().expect("the capture is intact");
            });
            drop(guard);
            assert_eq!(engine.stats().committed_bytes, 0);
        });
    }
}

#[test]
fn a_pool_closed_during_a_capture_ends_after_it() {
    let _turn = turn();
    let simulated = Simulated::default();
    simulated.unchanged(|| {
        let (engine, pool) = pool(&simulated.device);
        pool.allocate(0, 3 * PAGE).expect("room");
        let guard = CaptureGuard::new();
        pool.close().expect("left to the engine");
        let stats = engine.stats();
        assert_eq!((stats.parts.retiring_bytes, stats.ranges), (3 * PAGE, 1));
        assert_eq!(simulated.simulator.calls(DriverFunction::cuMemUnmap), 0);
        drop(guard);
        engine.step();
        let stats = engine.stats();
        assert_eq!((stats.committed_bytes, stats.ranges), (0, 0));
    });
}

#[test]
fn an_engine_that_ends_during_a_capture_leaves_its_memory_to_the_device() {
    let _turn = turn();
    let simulated = Simulated::default();
    simulated.unchanged(|| {
        let (engine, pool) = pool(&simulated.device);
        pool.allocate(0, 3 * PAGE).expect("room");
        let guard = CaptureGuard::new();
        drop((pool, engine));
        assert_eq!(simulated.simulator.calls(DriverFunction::cuMemUnmap), 0);
        assert_eq!(simulated.device.quarantined_bytes(), 3 * PAGE);
        drop(guard);
        assert_eq!(simulated.device.retry_quarantine(), 3 * PAGE);
    });
}

/// Nothing runs on a poisoned context, so there is nothing to wait for: the memory goes at the
/// first try, or went with the context, and the driver is not asked again.
#[test]
fn what_an_engine_left_is_not_waited_for_in_a_poisoned_context() {
    use DriverFunction::{cuCtxSynchronize, cuMemAddressFree, cuMemUnmap};
    let _turn = turn();
    for poisoned in [
        &[cuCtxSynchronize][..],
        &[cuCtxSynchronize, cuMemUnmap, cuMemAddressFree],
    ] {
        let simulated = Simulated::default();
        let (engine, pool) = pool(&simulated.device);
        pool.allocate(0, 3 * PAGE).expect("room");
        let guard = CaptureGuard::new();
        drop((pool, engine));
        drop(guard);
        for call in poisoned {
            let fault = Fault::always(*call, CUDA_ERROR_ILLEGAL_ADDRESS);
            simulated.simulator.inject(fault);
        }
        assert_eq!(simulated.device.retry_quarantine(), 3 * PAGE);
        simulated.simulator.start_trace();
        assert_eq!(simulated.device.retry_quarantine(), 0);
        assert_eq!(simulated.simulator.take_trace(), []);
    }
}

#[test]
fn questions_and_waits_leave_the_threads_capture_mode_as_it_was() {
    let _turn = turn();
    let simulated = Simulated::default();
    let stream = Stream::new(&simulated.device).expect("a stream");
    let exchange = |mut mode: CUstreamCaptureMode| {
        let table = simulated.driver.table();
        // SAFETY: `mode` is a valid place, with which the driver swaps.
        let code = unsafe { (table.cuThreadExchangeStreamCaptureMode)(&mut mode) };
        assert_eq!(code, CUDA_SUCCESS, "cuThreadExchangeStreamCaptureMode");
        mode
    };
    let before = exchange(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
    let fence = stream.record().expect("a fence");
    assert_eq!(fence.is_complete(), Ok(true));
    fence.wait().expect("done");
    stream.synchronize().expect("done");
    assert_eq!(exchange(before), CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
}

#[test]
fn memory_that_was_leased_waits_for_the_end_of_a_declared_capture() {
    let _turn = turn();
    let simulated = Simulated::default();
    let (engine, pool) = pool(&simulated.device);
    let stream = Stream::new(&simulated.device).expect("a stream");
    pool.use_stream(&stream).expect("of this device");
    pool.allocate(0, PAGE).expect("room");
    let token = std::sync::Arc::new(());
    pool.lease(0, PAGE, token.clone()).expect("live");
    drop(token);
    let capture = CaptureGuard::new();
    pool.deallocate(0, PAGE).expect("live");
    let report = engine.step();
    let bytes = (report.drained_bytes, report.retiring_bytes);
    assert_eq!(bytes, (0, PAGE), "there is no telling");
    drop(capture);
    assert_eq!(engine.step().drained_bytes, PAGE);
}

/// The simulated driver's own functions, of the test that has its turn.
static OWN: Mutex<Option<DriverTable>> = Mutex::new(None);
/// Whether the next record comes just after a capture of its stream has begun.
static CAPTURES_FIRST: AtomicBool = AtomicBool::new(false);
/// So many queries of events say that there is no telling yet.
static TELLS_LATER: AtomicUsize = AtomicUsize::new(0);

fn own() -> DriverTable {
    let own = OWN.lock().unwrap_or_else(PoisonError::into_inner);
    (*own).expect("set before the driver is opened")
}

unsafe extern "C" fn record_in_a_capture(event: CUevent, stream: CUstream) -> CUresult {
    let own = own();
    if CAPTURES_FIRST.swap(false, Ordering::SeqCst) {
        // SAFETY: the caller's stream, in its context.
        let code = unsafe { (own.cuStreamBeginCapture)(stream, CU_STREAM_CAPTURE_MODE_GLOBAL) };
        assert_eq!(code, CUDA_SUCCESS);
    }
    // SAFETY: the caller's promise.
    unsafe { (own.cuEventRecord)(event, stream) }
}

unsafe extern "C" fn tell_later(event: CUevent) -> CUresult {
    let later = TELLS_LATER.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
    match later {
        Ok(_) => CUDA_ERROR_NOT_READY,
        // SAFETY: the caller's promise.
        Err(_) => unsafe { (own().cuEventQuery)(event) },
    }
}

/// A page that was freed behind a fence that belongs to a capture: it began when it was already
/// known that there is none.
fn freed_behind_a_captured_fence() -> (Simulator, Device, Engine, VirtualMemoryPool, Stream) {
    let simulator = Simulator::new(SimConfig::new()).expect("a simulator");
    let mut table = simulator.table();
    *OWN.lock().unwrap_or_else(PoisonError::into_inner) = Some(table);
    table.cuEventRecord = record_in_a_capture;
    table.cuEventQuery = tell_later;
    // SAFETY: the simulator outlives the driver, as tests drop it last.
    let driver = unsafe { Driver::from_table(table, DriverKind::Simulated) }.expect("a driver");
    let device = driver.device(0).expect("a device");
    let options = manual().limit_bytes(PAGE);
    let engine = Engine::new(&device, options).expect("an engine");
    let pool = VirtualMemoryPool::on_engine(&engine, 8 * PAGE, PAGE).expect("a pool");
    let stream = Stream::new(&device).expect("a stream");
    pool.use_stream(&stream).expect("of this device");
    pool.allocate(0, PAGE).expect("room");
    CAPTURES_FIRST.store(true, Ordering::SeqCst);
    pool.deallocate(0, PAGE).expect("live");
    assert!(!CAPTURES_FIRST.load(Ordering::SeqCst), "recorded");
    assert_eq!(stream.is_capturing(), Ok(true));
    (simulator, device, engine, pool, stream)
}

/// Ends a capture that was killed.
fn end_killed(stream: &Stream) {
    with_context(stream.device(), || {
        let mut graph = core::ptr::null_mut();
        // SAFETY: the stream is alive and `graph` a valid place for the answer.
        let code = unsafe { (own().cuStreamEndCapture)(stream.raw(), &mut graph) };
        assert_ne!(code, CUDA_SUCCESS);
    });
}

#[test]
fn a_fence_that_turns_out_to_be_captured_is_given_up_by_a_step() {
    let _turn = turn();
    let (_simulator, _device, engine, _pool, stream) = freed_behind_a_captured_fence();
    engine.step();
    end_killed(&stream);
    engine.step();
    assert_eq!(engine.stats().committed_bytes, 0);
}

#[test]
fn a_fence_that_turns_out_to_be_captured_is_given_up_by_the_thread_that_waits_for_it() {
    let _turn = turn();
    let (_simulator, _device, engine, pool, stream) = freed_behind_a_captured_fence();
    // So that it is waited for, and not only asked.
    TELLS_LATER.store(1, Ordering::SeqCst);
    let error = (pool.allocate(4 * PAGE, PAGE)).expect_err("a capture that is not declared");
    assert_eq!(TELLS_LATER.load(Ordering::SeqCst), 0);
    let refused = |error: &VmmError| matches!(error, VmmError::Driver(error) if error.call == DriverFunction::cuCtxSynchronize);
    assert!(refused(&error), "not the fence: {error}");
    end_killed(&stream);
    pool.allocate(4 * PAGE, PAGE).expect("the context answers");
    assert_eq!(engine.stats().parts.live_page_bytes, PAGE);
}
