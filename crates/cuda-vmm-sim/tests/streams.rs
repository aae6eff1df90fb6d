//! Streams and events: order, waiting, and work that runs later on what was mapped when it was
//! enqueued.
#![allow(
    clippy::macro_metavars_in_unsafe,
    reason = "every call of the table is unsafe"
)]

mod common;
use common::*;
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

/// Makes a driver with one accessible page.
fn page() -> (Driver, u64) {
    let driver = Driver::small();
    let address = driver.reserve(8 * PAGE).unwrap();
    driver.back(address, PAGE).unwrap();
    (driver, address)
}

fn query(driver: &Driver, stream: CUstream) -> Answer {
    call!(driver, cuStreamQuery(stream))
}

#[test]
fn held_work_waits_and_blocks() {
    let (driver, address) = page();
    let stream = driver.stream().unwrap();
    let event = driver.event().unwrap();
    assert_eq!(query(&driver, stream), Ok(()));
    assert_eq!(call!(driver, cuEventQuery(event)), Ok(()), "never recorded");
    driver.simulator.hold_work();
    driver.memset_async(address, 5, PAGE, stream).unwrap();
    call!(driver, cuEventRecord(event, stream)).unwrap();
    assert_eq!(query(&driver, stream), Err(CUDA_ERROR_NOT_READY));
    assert_eq!(
        call!(driver, cuEventQuery(event)),
        Err(CUDA_ERROR_NOT_READY)
    );

    let (there, context) = (driver.clone(), Shared(driver.retain(0).unwrap()));
    let (returned, work) = (AtomicBool::new(false), Shared((stream, event)));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            call!(there, cuCtxSetCurrent(context.get())).unwrap();
            call!(there, cuEventSynchronize(work.get().1)).unwrap();
            call!(there, cuStreamSynchronize(work.get().0)).unwrap();
            returned.store(true, Ordering::SeqCst);
        });
        std::thread::sleep(Duration::from_millis(50));
        assert!(!returned.load(Ordering::SeqCst), "both wait for held work");
        driver.simulator.release_work();
    });
    assert_eq!(query(&driver, stream), Ok(()));
    assert_eq!(call!(driver, cuEventQuery(event)), Ok(()));
    assert_eq!(driver.read(address, 3).unwrap(), [5; 3]);
}

#[test]
fn an_event_recorded_while_work_is_held_is_not_ready() {
    let (driver, _) = page();
    let (stream, event) = (driver.stream().unwrap(), driver.event().unwrap());
    driver.simulator.hold_work();
    call!(driver, cuEventRecord(event, stream)).unwrap();
    assert_eq!(
        call!(driver, cuEventQuery(event)),
        Err(CUDA_ERROR_NOT_READY)
    );
    driver.simulator.release_work();
    assert_eq!(call!(driver, cuEventSynchronize(event)), Ok(()));
}

#[test]
fn a_stream_keeps_its_order() {
    let (driver, address) = page();
    let stream = driver.stream().unwrap();
    let mut seen = vec![0u8; 100];
    for value in 1..=100u8 {
        driver.memset_async(address, value, 4096, stream).unwrap();
        let place = (&raw mut seen[usize::from(value) - 1]).cast();
        call!(driver, cuMemcpyDtoHAsync(place, address + 77, 1, stream)).unwrap();
    }
    call!(driver, cuStreamSynchronize(stream)).unwrap();
    assert_eq!(seen, (1..=100).collect::<Vec<u8>>());
}

#[test]
fn an_asynchronous_copy_to_the_host_is_over_when_the_call_returns() {
    let (driver, address) = page();
    let stream = driver.stream().unwrap();
    driver.memset_async(address, 9, PAGE, stream).unwrap();
    let mut seen = vec![0u8; PAGE];
    let place = seen.as_mut_ptr().cast();
    call!(driver, cuMemcpyDtoHAsync(place, address, PAGE, stream)).unwrap();
    assert!(seen.iter().all(|&byte| byte == 9));
    driver.simulator.hold_work();
    driver.memset_async(address, 8, 1, stream).unwrap();
    // A copy of 0 bytes waits for nothing.
    call!(driver, cuMemcpyDtoHAsync(place, address, 0, stream)).unwrap();
    driver.simulator.release_work();
}

#[test]
fn copies_move_bytes_across_mappings() {
    let (driver, address) = page();
    driver.back(address + PAGE as u64, PAGE).unwrap();
    driver.back(address + 4 * PAGE as u64, 4 * PAGE).unwrap();
    let data: Vec<u8> = (0..3 * PAGE / 2)
        .map(|index| (index * 7 % 251) as u8)
        .collect();
    let stream = driver.stream().unwrap();
    let copy = data.clone();
    call!(
        driver,
        cuMemcpyHtoDAsync(address + 1000, copy.as_ptr().cast(), copy.len(), stream)
    )
    .unwrap();
    drop(copy);
    let target = address + 5 * PAGE as u64 + 3;
    call!(
        driver,
        cuMemcpyDtoDAsync(target, address + 1000, data.len(), stream)
    )
    .unwrap();
    call!(driver, cuStreamSynchronize(stream)).unwrap();
    assert_eq!(driver.read(target, data.len()).unwrap(), data);
    call!(driver, cuMemcpyDtoD(address, target, 100)).unwrap();
    assert_eq!(driver.read(address, 100).unwrap(), data[..100]);
    assert_eq!(
        call!(driver, cuMemcpyDtoH(null_mut(), address, 0)),
        Ok(()),
        "nothing to copy"
    );
    assert_eq!(
        call!(driver, cuMemcpyDtoH(null_mut(), address, 1)),
        Err(CUDA_ERROR_INVALID_VALUE)
    );
}

#[test]
fn a_wait_orders_two_streams() {
    let (driver, address) = page();
    let (first, second) = (driver.stream().unwrap(), driver.stream().unwrap());
    let event = driver.event().unwrap();
    driver.simulator.hold_work();
    driver.memset_async(address, 1, PAGE, first).unwrap();
    call!(driver, cuEventRecord(event, first)).unwrap();
    call!(driver, cuStreamWaitEvent(second, event, 0)).unwrap();
    driver.memset_async(address, 2, PAGE, second).unwrap();
    // The second stream does not wait for a later record.
    call!(driver, cuEventRecord(event, second)).unwrap();
    driver.simulator.release_work();
    call!(driver, cuStreamSynchronize(second)).unwrap();
    assert_eq!(query(&driver, first), Ok(()));
    assert_eq!(driver.read(address + PAGE as u64 - 1, 1).unwrap(), [2]);
}

#[test]
fn the_legacy_stream_is_ordered_with_blocking_streams() {
    let (driver, address) = page();
    let (blocking, free) = (
        driver.stream_with(CU_STREAM_DEFAULT).unwrap(),
        driver.stream().unwrap(),
    );
    let per_thread = std::ptr::without_provenance_mut(2);
    driver.simulator.hold_work();
    driver.memset_async(address, 1, 1, blocking).unwrap();
    driver.memset_async(address, 2, 1, null_mut()).unwrap();
    driver.memset_async(address + 1, 2, 1, null_mut()).unwrap();
    driver.memset_async(address, 3, 1, per_thread).unwrap();
    driver.memset_async(address + 4096, 4, 1, free).unwrap();
    driver.simulator.release_work();
    call!(driver, cuStreamSynchronize(per_thread)).unwrap();
    assert_eq!(driver.read(address, 2).unwrap(), [3, 2]);
    call!(driver, cuCtxSynchronize()).unwrap();
    assert_eq!(driver.read(address + 4096, 1).unwrap(), [4]);
}

#[test]
fn host_functions_run_on_the_streams_thread_without_a_lock() {
    struct Seen {
        driver: Driver,
        thread: std::sync::Mutex<Option<std::thread::ThreadId>>,
        order: AtomicUsize,
    }
    unsafe extern "C" fn note(data: *mut c_void) {
        // SAFETY: the test below passes a `Seen` that outlives the work.
        let seen = unsafe { &*data.cast::<Seen>() };
        // This call would never return if the simulator held a lock.
        assert!(seen.driver.reserve(PAGE).is_ok());
        *seen.thread.lock().unwrap() = Some(std::thread::current().id());
        seen.order.fetch_add(1, Ordering::SeqCst);
    }
    let (driver, address) = page();
    let stream = driver.stream().unwrap();
    let seen = Seen {
        driver: driver.clone(),
        thread: Default::default(),
        order: AtomicUsize::new(0),
    };
    let data = (&raw const seen).cast_mut().cast();
    driver.memset_async(address, 1, PAGE, stream).unwrap();
    call!(driver, cuLaunchHostFunc(stream, Some(note), data)).unwrap();
    call!(driver, cuLaunchHostFunc(stream, Some(note), data)).unwrap();
    assert_eq!(
        call!(driver, cuLaunchHostFunc(stream, None, data)),
        Err(CUDA_ERROR_INVALID_VALUE)
    );
    call!(driver, cuStreamSynchronize(stream)).unwrap();
    assert_eq!(seen.order.load(Ordering::SeqCst), 2);
    let thread = seen.thread.lock().unwrap().expect("it ran");
    assert_ne!(thread, std::thread::current().id());
}

#[test]
fn memory_calls_do_not_wait_for_work() {
    let (driver, address) = page();
    let stream = driver.stream().unwrap();
    driver.simulator.hold_work();
    driver.memset_async(address, 1, PAGE, stream).unwrap();
    let other = address + PAGE as u64;
    driver.back(other, PAGE).unwrap();
    driver.unmap(other, PAGE).unwrap();
    let more = driver.reserve(PAGE).unwrap();
    driver.address_free(more, PAGE).unwrap();
    assert_eq!(
        query(&driver, stream),
        Err(CUDA_ERROR_NOT_READY),
        "it is still held"
    );
    driver.simulator.release_work();
    assert_eq!(call!(driver, cuStreamSynchronize(stream)), Ok(()));
}

#[test]
fn unknown_handles_are_refused() {
    let (driver, address) = page();
    let (stream, event) = (driver.stream().unwrap(), driver.event().unwrap());
    call!(driver, cuStreamDestroy(stream)).unwrap();
    call!(driver, cuEventDestroy(event)).unwrap();
    let invalid = Err(CUDA_ERROR_INVALID_HANDLE);
    for stream in [stream, std::ptr::without_provenance_mut(0x1234_5678)] {
        assert_eq!(query(&driver, stream), invalid);
        assert_eq!(driver.memset_async(address, 1, 1, stream), invalid);
        assert_eq!(call!(driver, cuStreamDestroy(stream)), invalid);
    }
    for event in [event, null_mut(), std::ptr::without_provenance_mut(7)] {
        assert_eq!(call!(driver, cuEventQuery(event)), invalid);
        assert_eq!(call!(driver, cuEventRecord(event, null_mut())), invalid);
        assert_eq!(call!(driver, cuEventDestroy(event)), invalid);
        assert_eq!(
            call!(driver, cuStreamWaitEvent(null_mut(), event, 0)),
            invalid
        );
    }
    for default in [0, 1, 2] {
        let stream = std::ptr::without_provenance_mut(default);
        assert_eq!(
            call!(driver, cuStreamDestroy(stream)),
            invalid,
            "default streams stay"
        );
    }
}

#[test]
fn a_destroyed_stream_finishes_its_work() {
    let (driver, address) = page();
    let (stream, event) = (driver.stream().unwrap(), driver.event().unwrap());
    driver.simulator.hold_work();
    driver.memset_async(address, 8, PAGE, stream).unwrap();
    call!(driver, cuEventRecord(event, stream)).unwrap();
    call!(driver, cuStreamDestroy(stream)).unwrap();
    assert_eq!(driver.books().streams, 0);
    assert_eq!(
        call!(driver, cuEventQuery(event)),
        Err(CUDA_ERROR_NOT_READY)
    );
    driver.simulator.release_work();
    call!(driver, cuEventSynchronize(event)).unwrap();
    assert_eq!(driver.read(address, 1).unwrap(), [8]);
}

#[test]
fn events_measure_time() {
    let (driver, address) = page();
    let stream = driver.stream().unwrap();
    let (start, end) = (driver.event().unwrap(), driver.event().unwrap());
    let mut milliseconds = -1.0;
    assert_eq!(
        call!(driver, cuEventElapsedTime(&mut milliseconds, start, end)),
        Err(CUDA_ERROR_INVALID_HANDLE)
    );
    call!(driver, cuEventRecord(start, stream)).unwrap();
    driver.memset_async(address, 1, PAGE, stream).unwrap();
    driver.simulator.hold_work();
    call!(driver, cuEventRecord(end, stream)).unwrap();
    assert_eq!(
        call!(driver, cuEventElapsedTime(&mut milliseconds, start, end)),
        Err(CUDA_ERROR_NOT_READY)
    );
    driver.simulator.release_work();
    call!(driver, cuStreamSynchronize(stream)).unwrap();
    call!(driver, cuEventElapsedTime(&mut milliseconds, start, end)).unwrap();
    assert!(
        milliseconds > 0.0 && milliseconds < 60_000.0,
        "{milliseconds}"
    );
}

#[test]
fn memory_may_be_mapped_and_unmapped_elsewhere_while_work_runs() {
    let driver = Driver::small();
    let address = driver.reserve(64 * PAGE).unwrap();
    driver.back(address, 32 * PAGE).unwrap();
    let stream = driver.stream().unwrap();
    unsafe extern "C" fn start(data: *mut c_void) {
        // SAFETY: the flag outlives the work.
        unsafe { &*data.cast::<AtomicBool>() }.store(true, Ordering::SeqCst);
    }
    // On a busy machine the memsets may complete before this thread runs again. Then the test
    // repeats them.
    for _ in 0..100 {
        let started = AtomicBool::new(false);
        let data = (&raw const started).cast_mut().cast();
        call!(driver, cuLaunchHostFunc(stream, Some(start), data)).unwrap();
        for _ in 0..4 {
            driver.memset_async(address, 6, 32 * PAGE, stream).unwrap();
        }
        while !started.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        let mut rounds = 0;
        while query(&driver, stream) == Err(CUDA_ERROR_NOT_READY) {
            driver.back(address + 40 * PAGE as u64, PAGE).unwrap();
            driver.unmap(address + 40 * PAGE as u64, PAGE).unwrap();
            rounds += 1;
        }
        assert_eq!(query(&driver, stream), Ok(()));
        if rounds > 0 {
            return;
        }
    }
    panic!("the memsets were always over before anything could be mapped");
}
