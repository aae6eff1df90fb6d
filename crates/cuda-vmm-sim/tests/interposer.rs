//! An interposer in front of a simulated driver: its books match the simulator's, and its faults do
//! not reach the simulator.
#![allow(
    clippy::macro_metavars_in_unsafe,
    reason = "every call of the table is unsafe"
)]

mod common;
use common::*;
use cuda_vmm_sim::Interposer;
use std::ptr::null_mut;
use std::sync::{Mutex, MutexGuard, PoisonError};

const OUT: CUresult = CUDA_ERROR_OUT_OF_MEMORY;

/// Runs the tests one at a time: the slot of a dropped interposer must stay free while its
/// functions are called.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A driver whose calls go through an interposer.
fn interposed() -> (Driver, Interposer) {
    let simulator = Simulator::new(SimConfig::new().memory_bytes(256 << 20)).expect("a free slot");
    // SAFETY: the simulator is kept beside the interposer, in `Driver`.
    let interposer = unsafe { Interposer::new(simulator.table()) }.expect("a free slot");
    let driver = Driver {
        table: interposer.table(),
        simulator,
    };
    call!(driver, cuInit(0)).expect("cuInit");
    driver.retain(0).expect("a context");
    driver.set_current(0).expect("current");
    (driver, interposer)
}

/// Fails unless the interposer counts what the simulator holds.
#[track_caller]
fn agree(driver: &Driver, interposer: &Interposer) -> Books {
    let books = interposer.books();
    assert_eq!(books, driver.books());
    books
}

#[test]
fn whatever_is_made_and_given_back_the_books_are_the_drivers() {
    let _turn = turn();
    let (driver, interposer) = interposed();
    let before = agree(&driver, &interposer);
    assert_eq!(before.context_retains, 1);

    let address = driver.reserve(8 * PAGE).unwrap();
    let handle = driver.create_with(2 * PAGE, &properties(0, true)).unwrap();
    driver.map(address, 2 * PAGE, handle).unwrap();
    driver
        .map(address + 4 * PAGE as u64, 2 * PAGE, handle)
        .unwrap();
    driver.open(address, 2 * PAGE).unwrap();
    agree(&driver, &interposer);
    driver.release(handle).unwrap();
    let held = agree(&driver, &interposer);
    assert_eq!((held.handles, held.physical_bytes), (0, 2 * PAGE));

    let mut retained = 0;
    let pointer = std::ptr::without_provenance_mut(address as usize);
    call!(driver, cuMemRetainAllocationHandle(&mut retained, pointer)).unwrap();
    agree(&driver, &interposer);
    let (mut descriptor, mut imported) = (-1, 0);
    let kind = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    let place = (&raw mut descriptor).cast();
    call!(
        driver,
        cuMemExportToShareableHandle(place, retained, kind, 0)
    )
    .unwrap();
    let pointer = std::ptr::without_provenance_mut(descriptor as usize);
    call!(
        driver,
        cuMemImportFromShareableHandle(&mut imported, pointer, kind)
    )
    .unwrap();
    assert_eq!(interposer.books().handles, 2);
    driver.release(imported).unwrap();
    driver.release(retained).unwrap();
    // SAFETY: the test owns the descriptor and closes it once.
    drop(unsafe { <std::os::fd::OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(descriptor) });
    agree(&driver, &interposer);

    let (stream, event) = (driver.stream().unwrap(), driver.event().unwrap());
    call!(
        driver,
        cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_GLOBAL)
    )
    .unwrap();
    driver.memset_async(address, 1, PAGE, stream).unwrap();
    let (mut graph, mut exec) = (null_mut(), null_mut());
    call!(driver, cuStreamEndCapture(stream, &mut graph)).unwrap();
    call!(driver, cuGraphInstantiateWithFlags(&mut exec, graph, 0)).unwrap();
    assert_eq!(agree(&driver, &interposer).graphs, 2);
    call!(driver, cuGraphExecDestroy(exec)).unwrap();
    call!(driver, cuGraphDestroy(graph)).unwrap();
    call!(driver, cuEventDestroy(event)).unwrap();

    let mut host = vec![0u8; 3 * 4096];
    let place = host.as_mut_ptr().cast();
    call!(driver, cuMemHostRegister(place, host.len(), 0)).unwrap();
    let held = agree(&driver, &interposer);
    let registered = (held.host_registrations, held.host_registered_bytes);
    assert_eq!(registered, (1, host.len()));
    let again = call!(driver, cuMemHostRegister(place, host.len(), 0));
    assert_eq!(again, Err(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED));
    let inside = place.wrapping_byte_add(4096);
    let refused = call!(driver, cuMemHostUnregister(inside));
    assert_eq!(refused, Err(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED));
    assert_eq!(agree(&driver, &interposer), held);
    interposer.inject(Fault::nth_of(DriverFunction::cuMemHostUnregister, 1, OUT));
    assert_eq!(call!(driver, cuMemHostUnregister(place)), Err(OUT));
    assert_eq!(agree(&driver, &interposer), held);
    call!(driver, cuMemHostUnregister(place)).unwrap();

    let mut plain = [0, 0];
    call!(driver, cuMemAlloc(&mut plain[0], PAGE)).unwrap();
    call!(driver, cuMemAllocAsync(&mut plain[1], PAGE, stream)).unwrap();
    assert_eq!(agree(&driver, &interposer).plain_bytes, 2 * PAGE);
    call!(driver, cuMemFree(plain[0])).unwrap();
    call!(driver, cuMemFreeAsync(plain[1], stream)).unwrap();
    call!(driver, cuStreamSynchronize(stream)).unwrap();
    call!(driver, cuStreamDestroy(stream)).unwrap();

    // One call unmaps both mappings and the gap between them.
    driver.unmap(address, 8 * PAGE).unwrap();
    driver.address_free(address, 8 * PAGE).unwrap();
    assert_eq!(agree(&driver, &interposer), before);
}

#[test]
fn what_a_capture_allocates_is_not_in_the_books() {
    let _turn = turn();
    let (driver, interposer) = interposed();
    let stream = driver.stream().unwrap();
    let before = agree(&driver, &interposer);
    for frees in [true, false] {
        call!(
            driver,
            cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_GLOBAL)
        )
        .unwrap();
        let (mut inside, mut outside) = (0, 0);
        call!(driver, cuMemAllocAsync(&mut inside, PAGE, stream)).unwrap();
        assert_eq!(agree(&driver, &interposer), before);
        call!(driver, cuMemAllocAsync(&mut outside, PAGE, null_mut())).unwrap();
        assert_eq!(agree(&driver, &interposer).plain_allocations, 1);
        let refused = call!(driver, cuMemFreeAsync(outside, stream));
        assert_eq!(refused, Err(CUDA_ERROR_INVALID_VALUE));
        assert_eq!(agree(&driver, &interposer).plain_allocations, 1);
        call!(driver, cuMemFreeAsync(outside, null_mut())).unwrap();
        if frees {
            call!(driver, cuMemFreeAsync(inside, stream)).unwrap();
        }
        let (mut graph, mut exec) = (null_mut(), null_mut());
        call!(driver, cuStreamEndCapture(stream, &mut graph)).unwrap();
        call!(driver, cuGraphInstantiateWithFlags(&mut exec, graph, 0)).unwrap();
        call!(driver, cuGraphLaunch(exec, stream)).unwrap();
        if !frees {
            call!(driver, cuMemFreeAsync(inside, stream)).unwrap();
        }
        call!(driver, cuCtxSynchronize()).unwrap();
        assert_eq!(interposer.books().physical_bytes, before.physical_bytes);
        assert_eq!(driver.books().physical_bytes, before.physical_bytes + PAGE);
        call!(driver, cuGraphExecDestroy(exec)).unwrap();
        call!(driver, cuGraphDestroy(graph)).unwrap();
        call!(driver, cuDeviceGraphMemTrim(0)).unwrap();
        assert_eq!(agree(&driver, &interposer), before);
    }
}

#[test]
fn a_call_that_a_fault_answers_does_not_reach_the_driver() {
    let _turn = turn();
    let (driver, interposer) = interposed();
    interposer.inject(Fault::nth_of(DriverFunction::cuMemCreate, 2, OUT));
    let handle = driver.create(PAGE).unwrap();
    assert_eq!(driver.create(PAGE), Err(OUT));
    assert_eq!(interposer.calls(DriverFunction::cuMemCreate), 2);
    assert_eq!(driver.simulator.calls(DriverFunction::cuMemCreate), 1);
    interposer.inject(Fault::always(DriverFunction::cuMemRelease, OUT));
    interposer.start_trace();
    assert_eq!(driver.release(handle), Err(OUT));
    assert_eq!(interposer.take_trace(), [DriverFunction::cuMemRelease]);
    assert_eq!(agree(&driver, &interposer).handles, 1);
    interposer.clear_faults();
    driver.release(handle).unwrap();
    assert_eq!(agree(&driver, &interposer).handles, 0);
}

#[test]
fn what_the_driver_refuses_to_take_back_stays_in_the_books() {
    let _turn = turn();
    let (driver, interposer) = interposed();
    let address = driver.reserve(4 * PAGE).unwrap();
    driver.back(address, 2 * PAGE).unwrap();
    let stream = driver.stream().unwrap();
    let held = agree(&driver, &interposer);
    assert_eq!(
        driver.address_free(address, 4 * PAGE),
        Err(CUDA_ERROR_INVALID_VALUE)
    );
    assert_eq!(driver.unmap(address, PAGE), Err(CUDA_ERROR_INVALID_VALUE));
    assert_eq!(
        driver.unmap(address + PAGE as u64, PAGE),
        Err(CUDA_ERROR_INVALID_VALUE)
    );
    assert_eq!(
        call!(driver, cuMemFree(address)),
        Err(CUDA_ERROR_INVALID_VALUE)
    );
    assert_eq!(
        call!(driver, cuMemFreeAsync(address, stream)),
        Err(CUDA_ERROR_INVALID_VALUE)
    );
    let refused = DriverFunction::cuStreamDestroy;
    driver.simulator.inject(Fault::nth_of(refused, 1, OUT));
    assert_eq!(call!(driver, cuStreamDestroy(stream)), Err(OUT));
    assert_eq!(agree(&driver, &interposer), held);
    call!(driver, cuStreamDestroy(stream)).unwrap();
    driver.unmap(address, 2 * PAGE).unwrap();
    driver.address_free(address, 4 * PAGE).unwrap();
    agree(&driver, &interposer);
}

#[test]
fn a_driver_without_a_newer_call_has_none_behind_an_interposer() {
    let _turn = turn();
    let simulator = Simulator::new(SimConfig::new().driver_version(12040)).expect("a free slot");
    // SAFETY: the simulator outlives the interposer.
    let interposer = unsafe { Interposer::new(simulator.table()) }.expect("a free slot");
    assert!(interposer.table().cuCtxRecordEvent.is_none());
    drop(interposer);
}

#[test]
fn the_functions_of_one_that_is_gone_answer_so() {
    let _turn = turn();
    let (driver, interposer) = interposed();
    let clone = interposer.clone();
    drop(interposer);
    let handle = driver.create(PAGE).expect("a clone is left");
    driver.release(handle).expect("a clone is left");
    drop(clone);
    assert_eq!(driver.create(PAGE), Err(CUDA_ERROR_DEINITIALIZED));
}
