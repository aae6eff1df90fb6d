//! Initialization, devices and their primary contexts.
#![allow(
    clippy::macro_metavars_in_unsafe,
    reason = "every call of the table is unsafe"
)]

mod common;
use common::*;
use std::ffi::{CStr, c_char};
use std::ptr::null_mut;

/// Returns the text at a pointer that a call has returned.
fn text_at(pointer: *const c_char) -> String {
    // SAFETY: the callers below pass a pointer that a successful call has written or returned.
    let text = unsafe { CStr::from_ptr(pointer) };
    text.to_str().unwrap().to_owned()
}

#[test]
fn nothing_answers_before_initialisation() {
    let simulator = Simulator::new(SimConfig::new()).unwrap();
    let driver = Driver {
        table: simulator.table(),
        simulator,
    };
    let mut count = 0;
    assert_eq!(
        call!(driver, cuDeviceGetCount(&mut count)),
        Err(CUDA_ERROR_NOT_INITIALIZED)
    );
    assert_eq!(driver.reserve(PAGE), Err(CUDA_ERROR_NOT_INITIALIZED));
    let mut version = 0;
    call!(driver, cuDriverGetVersion(&mut version)).unwrap();
    assert_eq!(version, 13000);
    assert_eq!(call!(driver, cuInit(1)), Err(CUDA_ERROR_INVALID_VALUE));
    call!(driver, cuInit(0)).unwrap();
    call!(driver, cuDeviceGetCount(&mut count)).unwrap();
    assert_eq!(count, 1);

    let none = Simulator::new(SimConfig::new().devices(0)).unwrap();
    let none = Driver {
        table: none.table(),
        simulator: none,
    };
    assert_eq!(call!(none, cuInit(0)), Err(CUDA_ERROR_NO_DEVICE));
    assert_eq!(none.books(), Books::default());
}

#[test]
fn devices_describe_themselves() {
    let driver = Driver::new(SimConfig::new().devices(2).memory_bytes(3 << 30));
    let mut device = -1;
    call!(driver, cuDeviceGet(&mut device, 1)).unwrap();
    assert_eq!(device, 1);
    for wrong in [-1, 2] {
        assert_eq!(
            call!(driver, cuDeviceGet(&mut device, wrong)),
            Err(CUDA_ERROR_INVALID_DEVICE)
        );
    }
    let mut name = [1 as c_char; 64];
    call!(driver, cuDeviceGetName(name.as_mut_ptr(), 64, 1)).unwrap();
    assert_eq!(text_at(name.as_ptr()), "Simulated device 1");
    call!(driver, cuDeviceGetName(name.as_mut_ptr(), 4, 1)).unwrap();
    assert_eq!(text_at(name.as_ptr()), "Sim", "cut to fit");
    let mut bytes = 0;
    call!(driver, cuDeviceTotalMem(&mut bytes, 0)).unwrap();
    assert_eq!(bytes, 3 << 30);
    for attribute in [
        CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
        CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED,
    ] {
        let mut value = 0;
        call!(driver, cuDeviceGetAttribute(&mut value, attribute, 0)).unwrap();
        assert_eq!(value, 1);
    }
    let peer = |device, peer| {
        let mut can_access = -1;
        call!(driver, cuDeviceCanAccessPeer(&mut can_access, device, peer)).map(|()| can_access)
    };
    assert_eq!(
        (peer(0, 1), peer(0, 0), peer(0, 2)),
        (Ok(1), Ok(0), Err(CUDA_ERROR_INVALID_DEVICE))
    );
    let uuid = |device| {
        let mut uuid = CUuuid { bytes: [0; 16] };
        call!(driver, cuDeviceGetUuid(&mut uuid, device)).map(|()| uuid.bytes)
    };
    assert_ne!(uuid(0).unwrap(), uuid(1).unwrap());
}

#[test]
fn errors_have_names_and_null_pointers_are_refused() {
    let driver = Driver::small();
    let mut text = std::ptr::null();
    call!(
        driver,
        cuGetErrorName(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, &mut text)
    )
    .unwrap();
    assert_eq!(text_at(text), "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED");
    call!(
        driver,
        cuGetErrorString(CUDA_ERROR_OUT_OF_MEMORY, &mut text)
    )
    .unwrap();
    assert!(!text.is_null());
    assert_eq!(
        call!(driver, cuGetErrorName(77777, &mut text)),
        Err(CUDA_ERROR_INVALID_VALUE)
    );
    assert!(text.is_null());
    let invalid = Err(CUDA_ERROR_INVALID_VALUE);
    assert_eq!(
        call!(driver, cuMemAddressReserve(null_mut(), PAGE, 0, 0, 0)),
        invalid
    );
    let mut handle = 0;
    assert_eq!(
        call!(
            driver,
            cuMemCreate(null_mut(), PAGE, &properties(0, false), 0)
        ),
        invalid
    );
    assert_eq!(
        call!(driver, cuMemCreate(&mut handle, PAGE, std::ptr::null(), 0)),
        invalid
    );
    assert_eq!(call!(driver, cuStreamCreate(null_mut(), 0)), invalid);
    assert_eq!(
        call!(driver, cuMemSetAccess(0, PAGE, std::ptr::null(), 1)),
        invalid
    );
    let books = driver.books();
    assert_eq!(
        books,
        Books {
            context_retains: 1,
            ..Books::default()
        },
        "nothing was left behind"
    );
}

#[test]
fn contexts_are_per_thread_and_counted() {
    let driver = Driver::small();
    let mut context = null_mut();
    call!(driver, cuCtxGetCurrent(&mut context)).unwrap();
    let shared = Shared(context);
    let there = driver.clone();
    std::thread::spawn(move || {
        let mut current = shared.get();
        call!(there, cuCtxGetCurrent(&mut current)).unwrap();
        assert!(current.is_null(), "a new thread has none");
        let mut device = -1;
        let none = Err(CUDA_ERROR_INVALID_CONTEXT);
        assert_eq!(call!(there, cuCtxGetDevice(&mut device)), none);
        assert_eq!(there.memset(0, 0, 1), none);
        assert_eq!(there.stream(), Err(CUDA_ERROR_INVALID_CONTEXT));
        assert_eq!(there.event(), Err(CUDA_ERROR_INVALID_CONTEXT));
        assert_eq!(call!(there, cuCtxSynchronize()), none);
        let (mut free, mut total, mut address) = (0, 0, 0);
        assert_eq!(call!(there, cuMemGetInfo(&mut free, &mut total)), none);
        assert_eq!(call!(there, cuMemAlloc(&mut address, 1)), none);
        // Virtual memory needs no context.
        let reserved = there.reserve(PAGE).unwrap();
        there.back(reserved, PAGE).unwrap();
        there.unmap(reserved, PAGE).unwrap();
        there.address_free(reserved, PAGE).unwrap();
        call!(there, cuCtxSetCurrent(shared.get())).unwrap();
        call!(there, cuCtxGetDevice(&mut device)).unwrap();
        assert_eq!(device, 0);
        let unknown = std::ptr::without_provenance_mut(4711);
        assert_eq!(call!(there, cuCtxSetCurrent(unknown)), none);
        call!(there, cuCtxSetCurrent(null_mut())).unwrap();
        assert_eq!(call!(there, cuCtxGetDevice(&mut device)), none);
    })
    .join()
    .unwrap();
}

#[test]
fn the_last_release_takes_the_context_down() {
    let driver = Driver::small();
    let address = driver.reserve(PAGE).unwrap();
    driver.back(address, PAGE).unwrap();
    driver.stream().unwrap();
    driver.event().unwrap();
    let mut plain = 0;
    call!(driver, cuMemAlloc(&mut plain, PAGE)).unwrap();
    let (mut flags, mut active) = (9, 9);
    call!(
        driver,
        cuDevicePrimaryCtxGetState(0, &mut flags, &mut active)
    )
    .unwrap();
    assert_eq!((flags, active), (0, 1));
    driver.retain(0).unwrap();
    call!(driver, cuDevicePrimaryCtxRelease(0)).unwrap();
    assert_eq!(driver.books().streams, 1, "one retain is left");
    call!(driver, cuDevicePrimaryCtxRelease(0)).unwrap();
    call!(
        driver,
        cuDevicePrimaryCtxGetState(0, &mut flags, &mut active)
    )
    .unwrap();
    assert_eq!(active, 0);
    assert_eq!(
        call!(driver, cuDevicePrimaryCtxRelease(0)),
        Err(CUDA_ERROR_INVALID_CONTEXT)
    );
    assert_eq!(
        call!(driver, cuCtxSynchronize()),
        Err(CUDA_ERROR_CONTEXT_IS_DESTROYED)
    );
    let books = driver.books();
    assert_eq!(
        (books.streams, books.events, books.plain_allocations),
        (0, 0, 0)
    );
    assert_eq!(
        (books.mappings, books.physical_bytes),
        (1, PAGE),
        "mapped memory is of no context"
    );
    driver.retain(0).unwrap();
    assert_eq!(
        driver.read(address, 1),
        Ok(vec![0]),
        "the same context again"
    );
}

#[test]
fn a_peer_needs_access_and_poisons_itself_alone() {
    let driver = Driver::new(SimConfig::new().devices(2).memory_bytes(64 << 20));
    let address = driver.reserve(2 * PAGE).unwrap();
    driver.back(address, PAGE).unwrap();
    driver.memset(address, 5, PAGE).unwrap();
    let peer = driver.retain(1).unwrap();
    call!(driver, cuCtxSetCurrent(peer)).unwrap();
    let both = [descriptor(0, 3), descriptor(1, 3)];
    driver.set_access(address, PAGE, &both).unwrap();
    assert_eq!(driver.read(address, 2), Ok(vec![5, 5]));
    assert_eq!(driver.memset(address, 6, 1), Ok(()));
    driver
        .set_access(address, PAGE, &[descriptor(1, 0)])
        .unwrap();
    assert_eq!(driver.read(address, 2), Err(CUDA_ERROR_INVALID_VALUE));
    driver.set_access(address, PAGE, &both).unwrap();
    driver.simulator.hold_work();
    let stream = driver.stream().unwrap();
    driver.memset_async(address, 7, PAGE, stream).unwrap();
    driver
        .set_access(address, PAGE, &[descriptor(1, 0)])
        .unwrap();
    driver.simulator.release_work();
    assert_eq!(
        call!(driver, cuStreamSynchronize(stream)),
        Err(CUDA_ERROR_ILLEGAL_ADDRESS)
    );
    assert!(driver.simulator.is_poisoned(1) && !driver.simulator.is_poisoned(0));
    driver.set_current(0).unwrap();
    assert_eq!(driver.read(address, 2), Ok(vec![6, 5]));
}

#[test]
fn work_of_a_context_that_is_taken_down_ends_quietly() {
    let driver = Driver::new(SimConfig::new().memory_bytes(512 << 20));
    let stream = driver.stream().unwrap();
    let mut plain = 0;
    call!(driver, cuMemAlloc(&mut plain, 400 << 20)).unwrap();
    for _ in 0..4 {
        driver.memset_async(plain, 1, 400 << 20, stream).unwrap();
    }
    std::thread::sleep(std::time::Duration::from_millis(5));
    call!(driver, cuDevicePrimaryCtxRelease(0)).unwrap();
    assert_eq!(driver.books(), Books::default());
    driver.retain(0).unwrap();
    call!(driver, cuMemAlloc(&mut plain, PAGE)).unwrap();
    assert_eq!(driver.read(plain, 2), Ok(vec![0, 0]));
    assert!(!driver.simulator.is_poisoned(0));
}
