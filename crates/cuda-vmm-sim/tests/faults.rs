//! Faults, call counts and traces.
#![allow(
    clippy::macro_metavars_in_unsafe,
    reason = "every call of the table is unsafe"
)]

mod common;
use common::*;

const OUT: CUresult = CUDA_ERROR_OUT_OF_MEMORY;

/// Reserve, create, map, set access, release, unmap, address free.
fn cycle(driver: &Driver) -> Answer {
    let address = driver.reserve(PAGE)?;
    let backed = driver.back(address, PAGE);
    driver.unmap(address, PAGE)?;
    driver.address_free(address, PAGE)?;
    backed
}

#[test]
fn the_nth_call_fails_once_without_effect() {
    let driver = Driver::small();
    let (address, before) = (driver.reserve(PAGE).unwrap(), driver.books());
    for n in 1..=4 {
        driver.simulator.inject(Fault::nth_call(n, OUT));
        let mut failed = 0;
        let handle = driver.create(PAGE).inspect_err(|_| failed = 1);
        if let Ok(handle) = handle {
            if driver.map(address, PAGE, handle) == Err(OUT) {
                failed = 2;
                assert_eq!(driver.books().mappings, 0);
            } else {
                if driver.open(address, PAGE) == Err(OUT) {
                    failed = 3;
                }
                if driver.unmap(address, PAGE) == Err(OUT) {
                    failed = 4;
                    assert_eq!(driver.books().mapped_bytes, PAGE, "still mapped");
                    driver.unmap(address, PAGE).unwrap();
                }
            }
            driver.release(handle).unwrap();
        }
        assert_eq!(failed, n);
        driver.simulator.clear_faults();
        assert_eq!(driver.books(), before);
    }
}

#[test]
fn queries_are_not_counted() {
    let driver = Driver::small();
    driver.simulator.inject(Fault::nth_call(1, OUT));
    let (mut count, mut context, mut mode) =
        (0, std::ptr::null_mut(), CU_STREAM_CAPTURE_MODE_RELAXED);
    call!(driver, cuDeviceGetCount(&mut count)).unwrap();
    call!(driver, cuCtxGetCurrent(&mut context)).unwrap();
    call!(driver, cuThreadExchangeStreamCaptureMode(&mut mode)).unwrap();
    assert_eq!(cycle(&driver), Err(OUT));
    assert_eq!(cycle(&driver), Ok(()));
}

#[test]
fn one_entry_point_fails_at_its_nth_call_or_always() {
    use DriverFunction::*;
    let driver = Driver::small();
    driver.simulator.inject(Fault::nth_of(cuMemCreate, 2, OUT));
    driver
        .simulator
        .inject(Fault::nth_of(cuMemCreate, 3, CUDA_ERROR_UNKNOWN));
    let made = [(); 4].map(|()| driver.create(PAGE).err());
    assert_eq!(made, [None, Some(OUT), Some(CUDA_ERROR_UNKNOWN), None]);
    driver
        .simulator
        .inject(Fault::always(cuMemRelease, CUDA_ERROR_UNKNOWN));
    assert_eq!(
        [(); 3].map(|()| driver.release(1)),
        [Err(CUDA_ERROR_UNKNOWN); 3]
    );
    driver.simulator.clear_faults();
    assert_eq!(driver.release(1), Err(CUDA_ERROR_INVALID_VALUE));
    assert_eq!(driver.books().handles, 2);
    assert_eq!(driver.simulator.calls(cuMemCreate), 4, "failed ones too");
    assert_eq!(driver.simulator.calls(cuMemRelease), 4);
    driver
        .simulator
        .inject(Fault::nth_of(cuDeviceGetCount, 1, OUT));
    let mut count = 0;
    assert_eq!(
        call!(driver, cuDeviceGetCount(&mut count)),
        Err(OUT),
        "queries too, when they are named"
    );
}

#[test]
fn a_trace_holds_calls_in_order() {
    use DriverFunction::*;
    let driver = Driver::small();
    driver.simulator.start_trace();
    cycle(&driver).unwrap();
    driver.set_current(0).unwrap();
    driver.simulator.inject(Fault::nth_call(1, OUT));
    driver.reserve(PAGE).unwrap_err();
    let expected = [
        cuMemAddressReserve,
        cuMemCreate,
        cuMemMap,
        cuMemSetAccess,
        cuMemRelease,
        cuMemUnmap,
        cuMemAddressFree,
        cuMemAddressReserve,
    ];
    assert_eq!(driver.simulator.take_trace(), expected);
    cycle(&driver).unwrap();
    assert_eq!(
        driver.simulator.take_trace(),
        [],
        "a trace that was taken has ended"
    );
}

#[test]
fn no_call_claims_success_without_having_it() {
    let driver = Driver::small();
    for fault in [
        Fault::nth_call(1, CUDA_SUCCESS),
        Fault::nth_of(DriverFunction::cuMemCreate, 1, CUDA_SUCCESS),
        Fault::always(DriverFunction::cuMemCreate, CUDA_SUCCESS),
    ] {
        driver.simulator.inject(fault);
        let before = driver.books();
        let handle = driver.create(PAGE).unwrap();
        assert_ne!(driver.books(), before, "it was made");
        driver.release(handle).unwrap();
    }
}
