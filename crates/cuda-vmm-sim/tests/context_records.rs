//! `cuCtxRecordEvent`: one record behind all work of a context.
#![allow(
    clippy::macro_metavars_in_unsafe,
    reason = "every call of the table is unsafe"
)]

mod common;
use common::*;
use std::ptr::null_mut;

/// Calls the table's `cuCtxRecordEvent`.
fn record(driver: &Driver, context: CUcontext, event: CUevent) -> Answer {
    let record = driver.table.cuCtxRecordEvent.expect("since 12.5");
    // SAFETY: the simulator checks both handles.
    answer(unsafe { record(context, event) })
}

/// Makes a driver with one accessible page.
fn page() -> (Driver, u64) {
    let driver = Driver::small();
    let address = driver.reserve(PAGE).unwrap();
    driver.back(address, PAGE).unwrap();
    (driver, address)
}

fn query(driver: &Driver, stream: CUstream) -> Answer {
    call!(driver, cuStreamQuery(stream))
}

#[test]
fn context_records_cover_every_stream() {
    let (driver, address) = page();
    let context = driver.retain(0).unwrap();
    let (first, second, event) = (
        driver.stream().unwrap(),
        driver.stream().unwrap(),
        driver.event().unwrap(),
    );
    driver.simulator.hold_work();
    driver.memset_async(address, 1, 1, first).unwrap();
    driver.memset_async(address + 1, 2, 1, second).unwrap();
    let recorded = |context, event| record(&driver, context, event);
    recorded(context, event).unwrap();
    assert_eq!(
        call!(driver, cuEventQuery(event)),
        Err(CUDA_ERROR_NOT_READY)
    );
    driver.simulator.release_work();
    call!(driver, cuEventSynchronize(event)).unwrap();
    assert_eq!(
        (query(&driver, first), query(&driver, second)),
        (Ok(()), Ok(()))
    );
    assert_eq!(recorded(null_mut(), event), Err(CUDA_ERROR_INVALID_CONTEXT));
    assert_eq!(
        recorded(context, null_mut()),
        Err(CUDA_ERROR_INVALID_HANDLE)
    );
    driver.simulator.hold_work();
    recorded(context, event).unwrap();
    assert_eq!(
        call!(driver, cuEventQuery(event)),
        Err(CUDA_ERROR_NOT_READY),
        "held, though idle"
    );
    driver.simulator.release_work();
    call!(driver, cuEventSynchronize(event)).unwrap();
    let old = Driver::new(SimConfig::new().driver_version(12040));
    assert!(old.table.cuCtxRecordEvent.is_none());
}

#[test]
fn a_context_record_covers_the_per_thread_streams_of_all_threads() {
    let (driver, address) = page();
    let context = driver.retain(0).unwrap();
    let event = driver.event().unwrap();
    driver.simulator.hold_work();
    let (there, shared) = (driver.clone(), Shared(context));
    std::thread::spawn(move || {
        call!(there, cuCtxSetCurrent(shared.get())).unwrap();
        let per_thread = std::ptr::without_provenance_mut(2);
        there.memset_async(address, 9, PAGE, per_thread).unwrap();
    })
    .join()
    .unwrap();
    let own = std::ptr::without_provenance_mut(2);
    assert_eq!(query(&driver, own), Ok(()), "this thread's is another");
    record(&driver, context, event).unwrap();
    assert_eq!(
        call!(driver, cuEventQuery(event)),
        Err(CUDA_ERROR_NOT_READY)
    );
    driver.simulator.release_work();
    call!(driver, cuEventSynchronize(event)).unwrap();
    // SAFETY: the page is accessible, and the only work on it has completed.
    assert_eq!(unsafe { *(address as *const u8) }, 9);
}

#[test]
fn a_context_record_kills_captures_of_every_mode() {
    let (driver, address) = page();
    let (context, event) = (driver.retain(0).unwrap(), driver.event().unwrap());
    let stream = driver.stream().unwrap();
    for mode in [
        CU_STREAM_CAPTURE_MODE_GLOBAL,
        CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
        CU_STREAM_CAPTURE_MODE_RELAXED,
    ] {
        for relaxed in [false, true] {
            call!(driver, cuStreamBeginCapture(stream, mode)).unwrap();
            driver.memset_async(address, 1, 4, stream).unwrap();
            let mut own = CU_STREAM_CAPTURE_MODE_RELAXED;
            if relaxed {
                call!(driver, cuThreadExchangeStreamCaptureMode(&mut own)).unwrap();
            }
            assert_eq!(
                record(&driver, context, event),
                Err(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)
            );
            if relaxed {
                call!(driver, cuThreadExchangeStreamCaptureMode(&mut own)).unwrap();
            }
            let mut graph = null_mut();
            assert_eq!(
                call!(driver, cuStreamEndCapture(stream, &mut graph)),
                Err(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED),
                "mode {mode}, relaxed {relaxed}"
            );
        }
    }
    assert_eq!(record(&driver, context, event), Ok(()), "no capture");
}
