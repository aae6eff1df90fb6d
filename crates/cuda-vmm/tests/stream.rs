//! Streams and fences: order, completion, and what is current on the thread.

mod common;

use common::{Gate, PAGE, Simulated, current_context, failure, set_current_context};
use cuda_vmm::sim::{Fault, SimConfig};
use cuda_vmm::sys::{CUDA_ERROR_OPERATING_SYSTEM, DriverFunction};
use cuda_vmm::{
    Access, Device, Engine, Mapping, PhysicalMemory, Reservation, Stream, VirtualMemoryPool,
    VmmError,
};
use std::sync::Arc;
use std::time::Duration;

fn memory(device: &Device) -> Mapping {
    let reservation = Reservation::new(device, PAGE).expect("address space");
    let memory = PhysicalMemory::new(device, PAGE).expect("memory");
    let access = [(device.clone(), Access::ReadWrite)];
    Mapping::new(&Arc::new(reservation), 0, &Arc::new(memory), &access).expect("mapped")
}

fn byte(stream: &Stream, address: u64) -> u8 {
    let mut byte = [0];
    // SAFETY: the tests pass addresses of mappings that live.
    unsafe { stream.read(address, &mut byte) }.expect("read");
    byte[0]
}

#[test]
fn what_is_written_copied_and_set_is_read() {
    let simulated = Simulated::default();
    simulated.unchanged(|| {
        let mapping = memory(&simulated.device);
        let stream = Stream::new(&simulated.device).expect("a stream");
        let [here, there] = [mapping.address(), mapping.address() + PAGE as u64 / 2];
        let mut bytes = [0; 6];
        // SAFETY: all addresses lie in the mapping, which outlives the work.
        unsafe {
            stream.memset(here, b'.', 6).expect("set");
            stream.write(here + 1, b"data").expect("written");
            stream.copy(there, here, 6).expect("copied");
            stream.read(there, &mut bytes).expect("read");
        }
        assert_eq!(&bytes, b".data.");
        // Nothing to do is no error.
        // SAFETY: no byte is touched.
        unsafe {
            stream.memset(here, 1, 0).expect("set");
            stream.write(here, &[]).expect("written");
            stream.read(here, &mut []).expect("read");
        }
        assert_eq!(byte(&stream, here), b'.');
    });
}

#[test]
fn addresses_that_were_never_reserved_are_the_drivers_error() {
    let simulated = Simulated::default();
    let stream = Stream::new(&simulated.device).expect("a stream");
    let nowhere = 4096;
    simulated.unchanged(|| {
        // SAFETY: the driver is to refuse the address.
        unsafe {
            assert_eq!(
                stream.memset(nowhere, 0, 1),
                Err(failure!(cuMemsetD8Async, CUDA_ERROR_INVALID_VALUE))
            );
            assert_eq!(
                stream.copy(nowhere, nowhere, 1),
                Err(failure!(cuMemcpyDtoDAsync, CUDA_ERROR_INVALID_VALUE))
            );
            assert_eq!(
                stream.write(nowhere, &[1]),
                Err(failure!(cuMemcpyHtoDAsync, CUDA_ERROR_INVALID_VALUE))
            );
            assert_eq!(
                stream.read(nowhere, &mut [1]),
                Err(failure!(cuMemcpyDtoH, CUDA_ERROR_INVALID_VALUE))
            );
        }
    });
    stream
        .synchronize()
        .expect("the context is not the worse for it");
}

#[test]
fn a_fence_is_complete_when_the_work_before_it_is() {
    let simulated = Simulated::default();
    let stream = Stream::new(&simulated.device).expect("a stream");
    simulated.unchanged(|| {
        let mapping = memory(&simulated.device);
        let held = simulated.hold_work();
        // SAFETY: the mapping outlives the work.
        unsafe { stream.memset(mapping.address(), 1, PAGE) }.expect("queued");
        let fence = stream.record().expect("a fence");
        assert_eq!(fence.device(), &simulated.device);
        for _ in 0..100 {
            assert_eq!(fence.is_complete(), Ok(false));
        }
        drop(held);
        fence.wait().expect("done");
        assert_eq!(fence.is_complete(), Ok(true));
        assert_eq!(byte(&stream, mapping.address()), 1);
    });
    let idle = stream.record().expect("a fence");
    assert_eq!(idle.is_complete(), Ok(true), "nothing is before it");
}

#[test]
fn a_stream_waits_for_anothers_fence_and_the_caller_does_not() {
    let simulated = Simulated::default();
    let device = &simulated.device;
    simulated.unchanged(|| {
        let mapping = memory(device);
        let [first, second] = [mapping.address(), mapping.address() + 1];
        let [ahead, behind] = [(), ()].map(|()| Stream::new(device).expect("a stream"));
        let gate = Gate::close(device, ahead.raw());
        // SAFETY: the mapping outlives the work, which is waited for below.
        unsafe { ahead.memset(first, 77, 1) }.expect("queued");
        let fence = ahead.record().expect("a fence");
        behind.wait_for(&fence).expect("queued");
        // SAFETY: as above.
        unsafe { behind.copy(second, first, 1) }.expect("queued");
        let last = behind.record().expect("a fence");
        assert!(gate.is_closed(), "nothing above waited for the gate");
        // Time for it to go wrong in.
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(fence.is_complete(), Ok(false));
        assert_eq!(last.is_complete(), Ok(false));
        gate.open();
        behind.synchronize().expect("done");
        assert_eq!(fence.is_complete(), Ok(true));
        assert_eq!(byte(&behind, second), 77, "copied after it was set");
    });
}

#[test]
fn a_stream_waits_for_a_fence_of_another_device_but_not_of_another_driver() {
    let simulated = Simulated::new(SimConfig::new().devices(2));
    let other = Simulated::default();
    let stream = Stream::new(&simulated.device).expect("a stream");
    let second = simulated.driver.device(1).expect("a second device");
    let peer = Stream::new(&second)
        .expect("a stream")
        .record()
        .expect("a fence");
    stream
        .wait_for(&peer)
        .expect("devices may wait for each other");
    let stranger = Stream::new(&other.device).expect("a stream");
    let stranger = stranger.record().expect("a fence");
    let waits = simulated.simulator.calls(DriverFunction::cuStreamWaitEvent);
    assert_eq!(stream.wait_for(&stranger), Err(VmmError::WrongDriver));
    assert_eq!(
        simulated.simulator.calls(DriverFunction::cuStreamWaitEvent),
        waits,
        "a handle of one driver is nothing that another may be given"
    );
}

#[test]
fn a_stream_is_destroyed_with_its_last_clone_and_a_borrowed_one_never() {
    let simulated = Simulated::default();
    let device = &simulated.device;
    let stream = Stream::new(device).expect("a stream");
    assert_eq!(simulated.books().streams, 1);
    let clone = stream.clone();
    assert_eq!((clone.raw(), clone.device()), (stream.raw(), device));
    // SAFETY: the stream is this device's and outlives the borrow.
    let borrowed = unsafe { Stream::borrow(device, stream.raw()) };
    borrowed.record().expect("a fence").wait().expect("done");
    drop((borrowed, stream));
    assert_eq!(simulated.books().streams, 1);
    clone.synchronize().expect("still there");
    drop(clone);
    assert_eq!(simulated.books().streams, 0);
    for default in [0, 2] {
        let raw = core::ptr::without_provenance_mut(default);
        // SAFETY: the default streams live as long as the context.
        let stream = unsafe { Stream::borrow(device, raw) };
        stream.record().expect("a fence").wait().expect("done");
        drop(stream);
    }
    let calls = simulated.simulator.calls(DriverFunction::cuStreamDestroy);
    assert_eq!(calls, 1);
    assert_eq!(simulated.books().events, 0);
}

#[test]
fn a_refused_call_leaves_no_stream_and_no_event_behind() {
    let simulated = Simulated::default();
    let stream = Stream::new(&simulated.device).expect("a stream");
    let fence = stream.record().expect("a fence");
    let code = CUDA_ERROR_OPERATING_SYSTEM;
    for call in [
        DriverFunction::cuStreamCreate,
        DriverFunction::cuEventCreate,
        DriverFunction::cuStreamWaitEvent,
        DriverFunction::cuEventQuery,
        DriverFunction::cuEventSynchronize,
        DriverFunction::cuStreamSynchronize,
    ] {
        simulated.simulator.inject(Fault::nth_of(call, 1, code));
    }
    simulated.unchanged(|| {
        assert_eq!(
            Stream::new(&simulated.device).expect_err("refused"),
            failure!(cuStreamCreate, CUDA_ERROR_OPERATING_SYSTEM)
        );
        assert_eq!(
            stream.record().expect_err("refused"),
            failure!(cuEventCreate, CUDA_ERROR_OPERATING_SYSTEM)
        );
        let fault = Fault::nth_of(DriverFunction::cuEventRecord, 1, code);
        simulated.simulator.inject(fault);
        assert_eq!(
            stream.record().expect_err("refused"),
            failure!(cuEventRecord, CUDA_ERROR_OPERATING_SYSTEM)
        );
        assert_eq!(
            stream.wait_for(&fence),
            Err(failure!(cuStreamWaitEvent, CUDA_ERROR_OPERATING_SYSTEM))
        );
        assert_eq!(
            fence.is_complete(),
            Err(failure!(cuEventQuery, CUDA_ERROR_OPERATING_SYSTEM))
        );
        assert_eq!(
            fence.wait(),
            Err(failure!(cuEventSynchronize, CUDA_ERROR_OPERATING_SYSTEM))
        );
        assert_eq!(
            stream.synchronize(),
            Err(failure!(cuStreamSynchronize, CUDA_ERROR_OPERATING_SYSTEM))
        );
    });
    assert_eq!(fence.is_complete(), Ok(true), "each failed once");
}

/// Every public call that needs a context, once.
fn call_everything(device: &Device) {
    let stream = Stream::new(device).expect("a stream");
    let mapping = memory(device);
    // SAFETY: all addresses lie in the mapping, which outlives the work.
    unsafe {
        stream.memset(mapping.address(), 1, 8).expect("set");
        stream.write(mapping.address(), &[2; 8]).expect("written");
        let half = mapping.address() + 8;
        stream.copy(half, mapping.address(), 8).expect("copied");
        stream.read(half, &mut [0; 8]).expect("read");
    }
    let fence = stream.record().expect("a fence");
    stream.wait_for(&fence).expect("queued");
    fence.wait().expect("done");
    assert_eq!(fence.is_complete(), Ok(true));
    stream.synchronize().expect("done");
    device.free_bytes().expect("a number");
    device.synchronize().expect("done");
    let engine = Engine::new(device, common::manual()).expect("an engine");
    let pool = VirtualMemoryPool::on_engine(&engine, 4 * PAGE, PAGE).expect("a pool");
    pool.allocate(0, PAGE).expect("room");
    pool.deallocate(0, PAGE).expect("live");
    engine.step();
    pool.use_stream(&stream).expect("of this device");
    pool.allocate(0, PAGE).expect("room");
    pool.deallocate(0, PAGE).expect("live");
    pool.close().expect("closed");
}

#[test]
fn what_was_current_on_the_thread_is_current_after_every_call() {
    let simulated = Simulated::new(SimConfig::new().devices(2));
    let device = &simulated.device;
    let second = simulated.driver.device(1).expect("a second device");
    assert_ne!(device.raw_context(), second.raw_context());
    for context in [
        core::ptr::null_mut(),
        second.raw_context(),
        device.raw_context(),
    ] {
        set_current_context(device, context);
        call_everything(device);
        assert_eq!(current_context(device), context);
        // Failures restore it too.
        for call in [
            DriverFunction::cuStreamCreate,
            DriverFunction::cuCtxSynchronize,
            DriverFunction::cuMemGetInfo,
        ] {
            let fault = Fault::nth_of(call, 1, CUDA_ERROR_OPERATING_SYSTEM);
            simulated.simulator.inject(fault);
        }
        Stream::new(device).expect_err("refused");
        device.synchronize().expect_err("refused");
        device.free_bytes().expect_err("refused");
        assert_eq!(current_context(device), context);
    }
    set_current_context(device, core::ptr::null_mut());
}
