//! Memory is freed while the device still works on it.
//!
//! A host function that waits stops a stream, so that what is asserted about work under way follows
//! from the order of events and not from time.

use crate::common::{Gate, with_context};
use crate::{case, page, pool};
use core::ptr::null_mut;
use cuda_vmm::sys::{CU_EVENT_DISABLE_TIMING, CUDA_ERROR_NOT_READY, CUDA_SUCCESS};
use cuda_vmm::{Device, Stream};
use std::sync::mpsc::channel;
use std::time::Duration;

/// Frees memory while a stream that was named for the pool still writes to it.
#[test]
fn memory_is_not_unmapped_under_the_work_of_a_named_stream() {
    case(|device| {
        let page = page();
        let stream = Stream::new(device).expect("a stream");
        let (engine, pool) = pool(device, 4);
        pool.use_stream(&stream).expect("of this device");
        let address = pool.allocate(0, 2 * page).expect("room");
        let gate = Gate::close(device, stream.raw());
        // SAFETY: the pool keeps the memory mapped until the stream is past this.
        unsafe { stream.memset(address, 71, 2 * page) }.expect("queued");
        gate.wait_until_reached();
        pool.deallocate(0, 2 * page).expect("live");
        assert!(gate.is_closed(), "deallocate returned before the work ran");
        for _ in 0..3 {
            let report = engine.step();
            assert_eq!((report.retired_bytes, report.drained_bytes), (0, 0));
            assert_eq!(report.retiring_bytes, 2 * page);
        }
        assert_eq!(engine.trim(), Ok(0));
        // Other bytes are to be had meanwhile.
        pool.allocate(2 * page, page).expect("room");
        assert!(gate.is_closed());
        gate.open();
        stream.synchronize().expect("the memset met mapped memory");
        let report = engine.step();
        assert_eq!(
            (report.retired_bytes, report.drained_bytes),
            (2 * page, 2 * page)
        );
        assert_eq!(pool.stats().committed_bytes, page);
        pool.deallocate(2 * page, page).expect("live");
        engine.step();
        assert_eq!(engine.stats().committed_bytes, 0);
        pool.close().expect("closed");
    });
}

/// Whether an event recorded now on the whole context is complete; `None` where the driver has
/// none.
fn context_event_is_complete(device: &Device) -> Option<bool> {
    let table = *device.driver().table();
    let record = table.cuCtxRecordEvent?;
    with_context(device, || {
        let mut event = null_mut();
        // SAFETY: `event` is a valid place, and the context is current.
        let code = unsafe { (table.cuEventCreate)(&mut event, CU_EVENT_DISABLE_TIMING as _) };
        assert_eq!(code, CUDA_SUCCESS, "cuEventCreate");
        // SAFETY: context and event are alive.
        let code = unsafe { record(device.raw_context(), event) };
        assert_eq!(code, CUDA_SUCCESS, "cuCtxRecordEvent");
        // SAFETY: as above.
        let code = unsafe { (table.cuEventQuery)(event) };
        assert!(
            code == CUDA_SUCCESS || code == CUDA_ERROR_NOT_READY,
            "cuEventQuery: {code}"
        );
        // SAFETY: destroyed once.
        assert_eq!(unsafe { (table.cuEventDestroy)(event) }, CUDA_SUCCESS);
        Some(code == CUDA_SUCCESS)
    })
}

/// Frees memory for which no stream was named while `stream` is stopped in its work.
fn free_under_unnamed_work(device: &Device, gate: Gate, finish: impl FnOnce()) {
    let page = page();
    let (engine, pool) = pool(device, 2);
    // After the pool, so that a failure opens it before the pool waits for the device.
    let gate = gate;
    pool.allocate(0, 2 * page).expect("room");
    gate.wait_until_reached();
    pool.deallocate(0, 2 * page).expect("live");
    assert!(gate.is_closed(), "deallocate returned before the work ran");
    assert_eq!(engine.stats().parts.retiring_bytes, 2 * page);
    assert_eq!(engine.trim(), Ok(0), "the device may still use it");
    match context_event_is_complete(device) {
        // Only where the driver has no such event would a step wait for the context, and so for the
        // gate.
        None => {}
        Some(complete) => {
            assert!(!complete, "a context's event covers work of every stream");
            let report = engine.step();
            assert_eq!((report.retired_bytes, report.retiring_bytes), (0, 2 * page));
        }
    }
    assert!(gate.is_closed());
    gate.open();
    finish();
    let report = engine.step();
    assert_eq!(
        (report.retired_bytes, report.drained_bytes),
        (2 * page, 2 * page)
    );
    assert_eq!(engine.stats().committed_bytes, 0);
    pool.close().expect("closed");
}

#[test]
fn memory_is_not_unmapped_under_work_of_a_non_blocking_stream_that_is_not_named() {
    case(|device| {
        let stream = Stream::new(device).expect("a stream");
        let gate = Gate::close(device, stream.raw());
        free_under_unnamed_work(device, gate, || stream.synchronize().expect("done"));
    });
}

#[test]
fn memory_is_not_unmapped_under_work_of_another_threads_own_stream() {
    case(|device| {
        std::thread::scope(|scope| {
            let (closed, gate) = channel();
            let (opened, finish) = channel::<()>();
            let (done, finished) = channel();
            scope.spawn(move || {
                // SAFETY: the default stream of this thread, which lives as long as the context.
                let own = unsafe { Stream::borrow(device, core::ptr::without_provenance_mut(2)) };
                let _ = closed.send(Gate::close(device, own.raw()));
                let _ = finish.recv();
                let _ = done.send(own.synchronize());
            });
            let gate = gate.recv().expect("the other thread queued its work");
            free_under_unnamed_work(device, gate, || {
                drop(opened);
                let outcome = finished.recv().expect("the other thread waited");
                outcome.expect("done");
            });
        });
    });
}

#[test]
fn an_allocation_waits_for_the_very_memory_that_retires() {
    case(|device| {
        let page = page();
        let stream = Stream::new(device).expect("a stream");
        let (engine, pool) = pool(device, 1);
        let address = pool.allocate(0, page).expect("room");
        let gate = Gate::close(device, stream.raw());
        // SAFETY: the pool keeps the memory mapped until the stream is past this.
        unsafe { stream.memset(address, 81, page) }.expect("queued");
        pool.deallocate(0, page).expect("live");
        std::thread::scope(|scope| {
            // In here, so that a failure opens it before the scope waits for its threads.
            let gate = gate;
            let waiting = scope.spawn(|| pool.allocate(0, page));
            // Time for it to go wrong in.
            std::thread::sleep(Duration::from_millis(30));
            assert!(!waiting.is_finished(), "it may not have the bytes yet");
            gate.open();
            let outcome = waiting.join().expect("no panic");
            assert_eq!(outcome, Ok(address));
        });
        assert_eq!(engine.stats().parts.live_page_bytes, page);
        pool.close().expect("closed");
    });
}

/// Takes memory back while a stream that was named for the pool still writes to it, and writes to
/// it on another.
#[test]
fn memory_is_taken_back_at_once_and_the_streams_keep_the_order() {
    case(|device| {
        let page = page();
        let streams = [(); 2].map(|()| Stream::new(device).expect("a stream"));
        let (engine, pool) = pool(device, 1);
        for stream in &streams {
            pool.use_stream(stream).expect("of this device");
        }
        let address = pool.allocate(0, page).expect("room");
        let gate = Gate::close(device, streams[0].raw());
        // SAFETY: the pool keeps the memory mapped until the stream is past this.
        unsafe { streams[0].memset(address, 81, page) }.expect("queued");
        pool.deallocate(0, page).expect("live");
        assert_eq!(pool.try_allocate(0, page), Ok(address));
        // SAFETY: the memory is live.
        unsafe { streams[1].memset(address, 82, page) }.expect("queued");
        let last = streams[1].record().expect("an event");
        // Time for it to go wrong in.
        std::thread::sleep(Duration::from_millis(30));
        assert!(gate.is_closed() && !last.is_complete().expect("an answer"));
        gate.open();
        let mut bytes = [0; 64];
        // SAFETY: the memory is live, and this waits for the stream that wrote last.
        unsafe { streams[1].read(address, &mut bytes) }.expect("mapped");
        assert_eq!(bytes, [82; 64]);
        pool.deallocate(0, page).expect("live");
        streams
            .iter()
            .for_each(|stream| stream.synchronize().expect("done"));
        engine.step();
        assert_eq!(engine.stats().committed_bytes, 0);
        pool.close().expect("closed");
    });
}
