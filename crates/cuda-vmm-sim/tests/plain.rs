//! Plain allocations, and the memory that a context reports.
#![allow(
    clippy::macro_metavars_in_unsafe,
    reason = "every call of the table is unsafe"
)]

mod common;
use common::*;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, Ordering};

fn alloc(driver: &Driver, bytes: usize) -> Answer<u64> {
    let mut address = 0;
    call!(driver, cuMemAlloc(&mut address, bytes)).map(|()| address)
}

fn info(driver: &Driver) -> (usize, usize) {
    let (mut free, mut total) = (0, 0);
    call!(driver, cuMemGetInfo(&mut free, &mut total)).unwrap();
    (free, total)
}

#[test]
fn allocations_share_the_devices_memory() {
    let driver = Driver::small();
    let handle = driver.create(100 * PAGE).unwrap();
    assert_eq!(alloc(&driver, 29 * PAGE), Err(CUDA_ERROR_OUT_OF_MEMORY));
    let address = alloc(&driver, 28 * PAGE).unwrap();
    assert_eq!(info(&driver), (0, 256 << 20));
    assert_eq!(driver.create(PAGE), Err(CUDA_ERROR_OUT_OF_MEMORY));
    driver.memset(address, 4, 28 * PAGE).unwrap();
    call!(driver, cuMemFree(address)).unwrap();
    assert_eq!(
        call!(driver, cuMemFree(address)),
        Err(CUDA_ERROR_INVALID_VALUE),
        "twice"
    );
    assert_eq!(info(&driver), (28 * PAGE, 256 << 20));
    driver.release(handle).unwrap();
    let address = alloc(&driver, 1).unwrap();
    assert_eq!(driver.read(address, 1).unwrap(), [0], "fresh");
    let books = driver.books();
    assert_eq!(
        (
            books.plain_allocations,
            books.plain_bytes,
            books.physical_bytes
        ),
        (1, 4096, 4096)
    );
    assert_eq!(books.handles, 0);
    assert_eq!(
        call!(driver, cuMemFree(address + 1)),
        Err(CUDA_ERROR_INVALID_VALUE)
    );
    assert_eq!(call!(driver, cuMemFree(0)), Ok(()));
    assert_eq!(alloc(&driver, 0), Err(CUDA_ERROR_INVALID_VALUE));
}

#[test]
fn virtual_memory_calls_refuse_plain_addresses() {
    let driver = Driver::small();
    let address = alloc(&driver, PAGE).unwrap();
    assert_eq!(driver.unmap(address, PAGE), Err(CUDA_ERROR_INVALID_VALUE));
    assert_eq!(driver.open(address, PAGE), Err(CUDA_ERROR_INVALID_VALUE));
    assert_eq!(
        driver.address_free(address, PAGE),
        Err(CUDA_ERROR_INVALID_VALUE)
    );
    let mut handle = 0;
    let retained = call!(
        driver,
        cuMemRetainAllocationHandle(&mut handle, address as *mut std::ffi::c_void)
    );
    assert_eq!(retained, Err(CUDA_ERROR_INVALID_VALUE));
}

#[test]
fn a_free_waits_for_the_device() {
    let driver = Driver::small();
    let (address, other) = (alloc(&driver, PAGE).unwrap(), alloc(&driver, PAGE).unwrap());
    let stream = driver.stream().unwrap();
    driver.simulator.hold_work();
    driver.memset_async(other, 1, PAGE, stream).unwrap();
    let (there, context, freed) = (
        driver.clone(),
        Shared(driver.retain(0).unwrap()),
        AtomicBool::new(false),
    );
    std::thread::scope(|scope| {
        scope.spawn(|| {
            call!(there, cuCtxSetCurrent(context.get())).unwrap();
            call!(there, cuMemFree(address)).unwrap();
            freed.store(true, Ordering::SeqCst);
        });
        std::thread::sleep(std::time::Duration::from_millis(30));
        assert!(!freed.load(Ordering::SeqCst));
        driver.simulator.release_work();
    });
    assert!(freed.load(Ordering::SeqCst));
    assert_eq!(driver.books().plain_allocations, 1);
}

#[test]
fn an_asynchronous_free_takes_its_place_in_the_stream() {
    let driver = Driver::small();
    let stream = driver.stream().unwrap();
    let mut address = 0;
    call!(driver, cuMemAllocAsync(&mut address, PAGE, stream)).unwrap();
    driver.simulator.hold_work();
    driver.memset_async(address, 1, PAGE, stream).unwrap();
    call!(driver, cuMemFreeAsync(address, stream)).unwrap();
    assert_eq!(
        call!(driver, cuMemFreeAsync(address, stream)),
        Err(CUDA_ERROR_INVALID_VALUE),
        "twice"
    );
    assert_eq!(driver.books().plain_allocations, 1, "not yet");
    driver.simulator.release_work();
    call!(driver, cuStreamSynchronize(stream)).unwrap();
    assert_eq!(driver.books().physical_bytes, 0);
    assert_eq!(call!(driver, cuMemFreeAsync(0, stream)), Ok(()));
}

#[test]
fn use_after_an_asynchronous_free_is_an_illegal_access() {
    let driver = Driver::small();
    let (first, second) = (driver.stream().unwrap(), driver.stream().unwrap());
    let address = alloc(&driver, PAGE).unwrap();
    let event = driver.event().unwrap();
    driver.simulator.hold_work();
    call!(driver, cuMemFreeAsync(address, first)).unwrap();
    call!(driver, cuEventRecord(event, first)).unwrap();
    call!(driver, cuStreamWaitEvent(second, event, 0)).unwrap();
    driver.memset_async(address, 1, PAGE, second).unwrap();
    driver.simulator.release_work();
    assert_eq!(
        call!(driver, cuStreamSynchronize(second)),
        Err(CUDA_ERROR_ILLEGAL_ADDRESS)
    );
    assert_eq!(
        driver.memset_async(address, 1, 1, null_mut()),
        Err(CUDA_ERROR_ILLEGAL_ADDRESS)
    );
}
