//! Cases that run unchanged on a real GPU and on the simulated driver.
//!
//! `CUDA_VMM_TEST_DRIVER=real|simulated` chooses; where it is unset, `Driver::detect()` does. Where the
//! real driver is demanded and there is no GPU, every case fails. The cases take turns, because some of
//! them look at the memory that the device has left.

mod common;

use common::{Gate, current_context, manual, set_current_context, with_context};
use core::ptr::null_mut;
use cuda_vmm::sim::SimConfig;
use cuda_vmm::sys::*;
use cuda_vmm::{
    Access, Device, Driver, DriverKind, Engine, Mapping, PhysicalMemory, Reservation,
    SharedMemoryPool, SharedPoolOptions, Stream, VirtualMemoryPool, VmmError,
};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

const GIB: usize = 1 << 30;

/// The device, open for as long as the process lives, and warm: what the driver takes for itself at the
/// first use of a call is taken.
fn device() -> Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE
        .get_or_init(|| {
            let device = common::driver().device(0).expect("the first device");
            let page = device.granularity_bytes();
            let stream = Stream::new(&device).expect("a stream");
            let pool = VirtualMemoryPool::new(&device, 2 * page, page).expect("a pool");
            let address = pool.allocate(0, 2 * page).expect("room");
            let middle = address + page as u64;
            // SAFETY: the addresses are live until the pool is closed, after the work is waited for.
            unsafe {
                stream.memset(address, 1, page).expect("set");
                stream.copy(middle, address, page).expect("copied");
                stream.write(address, &[2; 64]).expect("written");
                stream.read(middle, &mut [0; 64]).expect("read");
            }
            Gate::close(&device, stream.raw()).open();
            let per_thread = core::ptr::without_provenance_mut(2);
            Gate::close(&device, per_thread).open();
            stream.record().expect("a fence").wait().expect("done");
            device.synchronize().expect("done");
            pool.deallocate(0, 2 * page).expect("live");
            pool.close().expect("closed");
            device
        })
        .clone()
}

fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a case alone, and fails unless the device has as much free memory afterwards as before.
#[track_caller]
fn case(test: impl FnOnce(&Device)) {
    let _turn = turn();
    let device = device();
    let before = device.free_bytes().expect("a number");
    test(&device);
    // What the driver gives back it may give back a moment later.
    let until = Instant::now() + Duration::from_secs(1);
    loop {
        let after = device.free_bytes().expect("a number");
        if after == before {
            break;
        }
        assert!(
            Instant::now() < until,
            "{before} bytes were free before, {after} after"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(device.quarantined_bytes(), 0);
}

fn reserve(device: &Device, pages: usize) -> Arc<Reservation> {
    let bytes = pages * device.granularity_bytes();
    Arc::new(Reservation::new(device, bytes).expect("address space"))
}

fn create(device: &Device, pages: usize) -> Arc<PhysicalMemory> {
    let bytes = pages * device.granularity_bytes();
    Arc::new(PhysicalMemory::new(device, bytes).expect("memory"))
}

fn map(reservation: &Arc<Reservation>, page: usize, memory: &Arc<PhysicalMemory>) -> Mapping {
    let device = reservation.device();
    let offset = page * device.granularity_bytes();
    let access = [(device.clone(), Access::ReadWrite)];
    Mapping::new(reservation, offset, memory, &access).expect("mapped")
}

/// Sets every byte of a range and waits.
fn fill(stream: &Stream, address: u64, bytes: usize, value: u8) {
    // SAFETY: callers pass memory that is mapped until the wait is over.
    unsafe { stream.memset(address, value, bytes) }.expect("queued");
    stream.synchronize().expect("done");
}

/// The first and the last byte of a range.
fn ends(stream: &Stream, address: u64, bytes: usize) -> [u8; 2] {
    [address, address + bytes as u64 - 1].map(|address| {
        let mut byte = [0];
        // SAFETY: callers pass memory that is mapped.
        unsafe { stream.read(address, &mut byte) }.expect("read");
        byte[0]
    })
}

fn properties(device: &Device) -> CUmemAllocationProp {
    // SAFETY: the struct holds integers and a pointer, for which all zeros is valid.
    let mut properties: CUmemAllocationProp = unsafe { core::mem::zeroed() };
    properties.type_ = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location.type_ = CU_MEM_LOCATION_TYPE_DEVICE;
    properties.location.id = device.raw();
    properties
}

fn raw_create(device: &Device, bytes: usize) -> CUresult {
    let mut handle = 0;
    // SAFETY: `handle` is a valid place; every caller expects a refusal.
    unsafe { (device.driver().table().cuMemCreate)(&mut handle, bytes, &properties(device), 0) }
}

fn raw_set_access(device: &Device, address: u64, bytes: usize) -> CUresult {
    let access = CUmemAccessDesc {
        location: properties(device).location,
        flags: CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
    };
    // SAFETY: the addresses are of a reservation of the test's own.
    unsafe { (device.driver().table().cuMemSetAccess)(address, bytes, &access, 1) }
}

fn raw_map(device: &Device, address: u64, bytes: usize, offset: usize, handle: u64) -> CUresult {
    // SAFETY: the addresses are of a reservation of the test's own; every caller expects a refusal.
    unsafe { (device.driver().table().cuMemMap)(address, bytes, offset, handle, 0) }
}

fn raw_unmap(device: &Device, address: u64, bytes: usize) -> CUresult {
    // SAFETY: the addresses are of a reservation of the test's own, and no work uses them.
    unsafe { (device.driver().table().cuMemUnmap)(address, bytes) }
}

#[test]
fn memory_is_created_in_whole_granules_and_no_more_than_there_is() {
    case(|device| {
        let page = device.granularity_bytes();
        assert_eq!(raw_create(device, 0), CUDA_ERROR_INVALID_VALUE);
        assert_eq!(raw_create(device, page + 1), CUDA_ERROR_INVALID_VALUE);
        let more = device.total_bytes().next_multiple_of(page) + page;
        assert_eq!(raw_create(device, more), CUDA_ERROR_OUT_OF_MEMORY);
        let error = PhysicalMemory::new(device, more).expect_err("more than there is");
        assert_eq!(error.driver_code(), Some(CUDA_ERROR_OUT_OF_MEMORY));
        assert!(error.is_out_of_memory() && error.is_later());
    });
}

#[test]
fn only_whole_mappings_are_unmapped_and_made_accessible() {
    case(|device| {
        let page = device.granularity_bytes();
        let stream = Stream::new(device).expect("a stream");
        let (reservation, memory) = (reserve(device, 4), create(device, 2));
        let mapping = map(&reservation, 0, &memory);
        let address = mapping.address();
        assert_eq!(raw_unmap(device, address, page), CUDA_ERROR_INVALID_VALUE);
        let middle = address + page as u64;
        assert_eq!(raw_unmap(device, middle, page), CUDA_ERROR_INVALID_VALUE);
        assert_eq!(
            raw_set_access(device, address, page),
            CUDA_ERROR_INVALID_VALUE,
            "a part"
        );
        assert_eq!(
            raw_set_access(device, address, 3 * page),
            CUDA_ERROR_INVALID_VALUE,
            "mapped and unmapped"
        );
        fill(&stream, address, 2 * page, 11);
        assert_eq!(ends(&stream, address, 2 * page), [11; 2], "still intact");
    });
}

#[test]
fn one_call_unmaps_whole_mappings_and_the_holes_between_them() {
    case(|device| {
        let page = device.granularity_bytes();
        let (reservation, memory) = (reserve(device, 4), create(device, 1));
        let mappings = [0, 2].map(|at| map(&reservation, at, &memory));
        let code = raw_unmap(device, reservation.address(), 4 * page);
        assert_eq!(code, CUDA_SUCCESS);
        // Both are undone already, so the objects must not undo them again. Their addresses and their
        // memory are then given back here, by hand.
        let (address, bytes) = (reservation.address(), reservation.bytes());
        let handle = memory.handle();
        for mapping in mappings {
            core::mem::forget(mapping);
        }
        core::mem::forget((reservation, memory));
        // SAFETY: nothing is mapped there any more, and the objects that owned these are forgotten.
        unsafe {
            drop(Reservation::from_raw(device, address, bytes));
            drop(PhysicalMemory::from_raw(device, handle, page));
        }
    });
}

#[test]
fn a_handle_is_mapped_whole_and_where_nothing_is() {
    case(|device| {
        let page = device.granularity_bytes();
        let (reservation, memory) = (reserve(device, 4), create(device, 2));
        let handle = memory.handle();
        let address = reservation.address();
        for (bytes, offset) in [(page, page), (page, 0)] {
            assert_eq!(
                raw_map(device, address, bytes, offset, handle),
                CUDA_ERROR_NOT_SUPPORTED,
                "{bytes} bytes at offset {offset} of the handle"
            );
        }
        let mapping = map(&reservation, 1, &memory);
        for at in [0, 1, 2] {
            let over = address + (at * page) as u64;
            let code = raw_map(device, over, 2 * page, 0, handle);
            assert_eq!(code, CUDA_ERROR_INVALID_VALUE, "over page {at}");
        }
        let access = [(device.clone(), Access::ReadWrite)];
        let error = Mapping::new(&reservation, page, &memory, &access).expect_err("mapped");
        assert_eq!(error.driver_code(), Some(CUDA_ERROR_INVALID_VALUE));
        drop(mapping);
    });
}

#[test]
fn addresses_are_freed_only_when_nothing_is_mapped() {
    case(|device| {
        let (reservation, memory) = (reserve(device, 2), create(device, 1));
        let mapping = map(&reservation, 1, &memory);
        // SAFETY: refused while something is mapped.
        let code = unsafe {
            (device.driver().table().cuMemAddressFree)(reservation.address(), reservation.bytes())
        };
        assert_eq!(code, CUDA_ERROR_INVALID_VALUE);
        mapping.close().expect("still there to be unmapped");
    });
}

#[test]
fn one_handle_at_two_addresses_is_the_same_memory() {
    case(|device| {
        let page = device.granularity_bytes();
        let stream = Stream::new(device).expect("a stream");
        let (reservation, memory) = (reserve(device, 3), create(device, 1));
        let [first, second] = [0, 2].map(|at| map(&reservation, at, &memory));
        fill(&stream, first.address(), page, 21);
        assert_eq!(ends(&stream, second.address(), page), [21; 2]);
        fill(&stream, second.address(), page, 22);
        assert_eq!(ends(&stream, first.address(), page), [22; 2]);
    });
}

#[test]
fn released_memory_lives_while_it_is_mapped_and_can_be_retained_by_its_address() {
    case(|device| {
        let page = device.granularity_bytes();
        let table = *device.driver().table();
        let stream = Stream::new(device).expect("a stream");
        let reservation = reserve(device, 1);
        let memory = PhysicalMemory::new(device, page).expect("memory");
        let handle = memory.into_raw();
        let address = reservation.address();
        assert_eq!(raw_map(device, address, page, 0, handle), CUDA_SUCCESS);
        assert_eq!(raw_set_access(device, address, page), CUDA_SUCCESS);
        // SAFETY: the one reference to the handle, given up once.
        assert_eq!(unsafe { (table.cuMemRelease)(handle) }, CUDA_SUCCESS);
        fill(&stream, address, page, 31);
        let mut retained = 0;
        let pointer = core::ptr::without_provenance_mut(address as usize);
        // SAFETY: `retained` is a valid place, and the pointer is only looked up.
        let code = unsafe { (table.cuMemRetainAllocationHandle)(&mut retained, pointer) };
        assert_eq!(code, CUDA_SUCCESS);
        assert_eq!(raw_unmap(device, address, page), CUDA_SUCCESS);
        // SAFETY: a reference of our own, to memory of this size.
        let memory = unsafe { PhysicalMemory::from_raw(device, retained, page) };
        let mapping = map(&reservation, 0, &Arc::new(memory));
        assert_eq!(ends(&stream, mapping.address(), page), [31; 2]);
    });
}

#[test]
fn plain_frees_refuse_mapped_memory_and_leave_it_intact() {
    case(|device| {
        let page = device.granularity_bytes();
        let table = *device.driver().table();
        let stream = Stream::new(device).expect("a stream");
        let (reservation, memory) = (reserve(device, 1), create(device, 1));
        let mapping = map(&reservation, 0, &memory);
        fill(&stream, mapping.address(), page, 51);
        with_context(device, || {
            // SAFETY: refused for memory of this kind.
            let code = unsafe { (table.cuMemFree)(mapping.address()) };
            assert_eq!(code, CUDA_ERROR_INVALID_VALUE);
            // SAFETY: as above.
            let code = unsafe { (table.cuMemFreeAsync)(mapping.address(), stream.raw()) };
            assert_eq!(code, CUDA_ERROR_INVALID_VALUE);
        });
        assert_eq!(ends(&stream, mapping.address(), page), [51; 2]);
    });
}

#[test]
fn addresses_have_an_end() {
    case(|device| {
        let error = Reservation::new(device, 1 << 47).expect_err("more than 47 bits");
        assert_eq!(error.driver_code(), Some(CUDA_ERROR_OUT_OF_MEMORY));
    });
}

#[test]
fn mapping_needs_no_current_context_and_leaves_none_behind() {
    case(|device| {
        let before = current_context(device);
        set_current_context(device, null_mut());
        let (reservation, memory) = (reserve(device, 1), create(device, 1));
        map(&reservation, 0, &memory).close().expect("unmapped");
        let stream = Stream::new(device).expect("a stream");
        stream.record().expect("a fence").wait().expect("done");
        device.synchronize().expect("done");
        assert_eq!(current_context(device), null_mut());
        set_current_context(device, before);
    });
}

/// A pool whose engine does nothing by itself.
fn pool(device: &Device, pages: usize) -> (Engine, VirtualMemoryPool) {
    let page = device.granularity_bytes();
    let engine = Engine::new(device, manual()).expect("an engine");
    let pool = VirtualMemoryPool::on_engine(&engine, pages * page, page).expect("a pool");
    (engine, pool)
}

#[test]
fn what_a_stream_writes_while_the_pool_grows_is_read_back() {
    const PAGES: usize = 12;
    case(|device| {
        let page = device.granularity_bytes();
        let stream = Stream::new(device).expect("a stream");
        let (_engine, pool) = pool(device, PAGES);
        pool.use_stream(&stream).expect("of this device");
        for at in 0..PAGES {
            let address = pool.allocate(at * page, page).expect("room");
            assert_eq!(address, pool.base_address() + (at * page) as u64);
            // SAFETY: live until the pool is closed, which waits for the stream.
            unsafe { stream.memset(address, at as u8 + 1, page) }.expect("queued");
        }
        for at in 0..PAGES {
            let address = pool.base_address() + (at * page) as u64;
            assert_eq!(ends(&stream, address, page), [at as u8 + 1; 2], "page {at}");
        }
        // A copy across every boundary between pages sees one range.
        let half = PAGES / 2 * page;
        let (low, high) = (pool.base_address(), pool.base_address() + half as u64);
        // SAFETY: both halves are live until the work is waited for.
        unsafe { stream.copy(low, high, half) }.expect("queued");
        for at in 0..PAGES / 2 {
            let address = pool.base_address() + (at * page) as u64;
            let expected = (at + PAGES / 2) as u8 + 1;
            assert_eq!(ends(&stream, address, page), [expected; 2], "page {at}");
        }
        pool.close().expect("closed");
    });
}

#[test]
fn a_reservation_of_128_gib_with_one_gib_behind_it() {
    case(|device| {
        let before = device.free_bytes().expect("a number");
        let pool = VirtualMemoryPool::new(device, 128 * GIB, 2 << 20).expect("addresses");
        assert_eq!(device.free_bytes(), Ok(before), "addresses cost no memory");
        let stream = Stream::new(device).expect("a stream");
        pool.use_stream(&stream).expect("of this device");
        let address = pool.allocate(100 * GIB, GIB).expect("room");
        assert_eq!(address, pool.base_address() + 100 * GIB as u64);
        assert_eq!(pool.physical_memory_usage(), GIB);
        assert_eq!(pool.stats().committed_bytes, GIB);
        let free_bytes = device.free_bytes().expect("a number");
        assert!(
            free_bytes <= before - GIB,
            "{before} bytes free before, {free_bytes} after"
        );
        for at in [0, GIB - (1 << 20)] {
            fill(&stream, address + at as u64, 1 << 20, 61);
            assert_eq!(ends(&stream, address + at as u64, 1 << 20), [61; 2]);
        }
        pool.deallocate(100 * GIB, GIB).expect("live");
        assert_eq!(pool.physical_memory_usage(), 0);
        pool.close().expect("closed");
    });
}

#[test]
fn two_models_under_a_limit_of_32_gib() {
    case(|device| {
        let options = SharedPoolOptions {
            engine: manual().limit_bytes(32 * GIB).chunk_bytes_max(128 << 20),
            page_bytes: None,
        };
        let pool = SharedMemoryPool::with_options(device, options).expect("a pool");
        for model in ["first", "second"] {
            pool.register_model(model, 64 * GIB).expect("addresses");
        }
        pool.allocate_for_model("first", 20 * GIB).expect("room");
        let first = pool.model_base_address("first").expect("registered");
        pool.allocate_for_model("second", 8 * GIB).expect("room");
        pool.allocate_for_model("second", 4 * GIB).expect("room");
        let error = pool
            .allocate_for_model("second", GIB)
            .expect_err("the limit");
        assert_eq!(
            error,
            VmmError::OutOfPhysicalMemory {
                asked_bytes: GIB,
                free_bytes: 0,
                retiring_bytes: 0,
                reclaimable_bytes: 0,
                limit_bytes: 32 * GIB
            }
        );
        assert!(error.is_later());
        assert_eq!(error.later_bytes(), GIB);
        assert_eq!(pool.stats().committed_bytes, 32 * GIB);
        pool.deallocate_for_model_address("first", first + 16 * GIB as u64, 4 * GIB)
            .expect("live");
        pool.allocate_for_model("second", GIB)
            .expect("what the first gave back");
        let live = |model| pool.model_stats(model).expect("registered").live_bytes;
        assert_eq!((live("first"), live("second")), (16 * GIB, 13 * GIB));
        assert!(pool.stats().committed_bytes <= 32 * GIB);
        for model in pool.models() {
            pool.unregister_model(&model).expect("closed");
        }
        assert_eq!(pool.stats().committed_bytes, 0);
    });
}

/// Frees memory while a stream that was named for the pool still writes to it.
#[test]
fn memory_is_not_unmapped_under_the_work_of_a_named_stream() {
    case(|device| {
        let page = device.granularity_bytes();
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
        let error = pool
            .try_allocate(0, page)
            .expect_err("those very bytes retire");
        assert!(error.is_later(), "{error}");
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

/// Whether an event recorded now on the whole context is complete; `None` where the driver has none.
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
fn free_under_unnamed_work(device: &Device, gate: &Gate, finish: impl FnOnce()) {
    let page = device.granularity_bytes();
    let (engine, pool) = pool(device, 2);
    pool.allocate(0, 2 * page).expect("room");
    gate.wait_until_reached();
    pool.deallocate(0, 2 * page).expect("live");
    assert!(gate.is_closed(), "deallocate returned before the work ran");
    assert_eq!(engine.stats().retiring_bytes, 2 * page);
    assert_eq!(engine.trim(), Ok(0), "the device may still use it");
    match context_event_is_complete(device) {
        // Only where the driver has no such event would a step wait for the context, and so for the gate.
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
fn memory_is_not_unmapped_under_work_of_a_non_blocking_stream_that_nobody_named() {
    case(|device| {
        let stream = Stream::new(device).expect("a stream");
        let gate = Gate::close(device, stream.raw());
        free_under_unnamed_work(device, &gate, || stream.synchronize().expect("done"));
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
            free_under_unnamed_work(device, &gate, || {
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
        let page = device.granularity_bytes();
        let stream = Stream::new(device).expect("a stream");
        let (engine, pool) = pool(device, 1);
        pool.use_stream(&stream).expect("of this device");
        let address = pool.allocate(0, page).expect("room");
        let gate = Gate::close(device, stream.raw());
        // SAFETY: the pool keeps the memory mapped until the stream is past this.
        unsafe { stream.memset(address, 81, page) }.expect("queued");
        pool.deallocate(0, page).expect("live");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| pool.allocate(0, page));
            // Time for it to go wrong in.
            std::thread::sleep(Duration::from_millis(30));
            assert!(!waiting.is_finished(), "it may not have the bytes yet");
            gate.open();
            let outcome = waiting.join().expect("no panic");
            assert_eq!(outcome, Ok(address));
        });
        assert_eq!(engine.stats().live_bytes, page);
        pool.close().expect("closed");
    });
}

#[test]
fn a_device_that_is_really_full_refuses_and_loses_nothing() {
    case(|device| {
        // The simulated device is a smaller one, to be full sooner.
        let device = match device.driver().kind() {
            DriverKind::Real => device.clone(),
            DriverKind::Simulated => {
                let config = SimConfig::new().memory_bytes(5 * GIB + GIB / 2);
                let driver = Driver::simulated(config).expect("a simulator");
                driver.device(0).expect("a device")
            }
        };
        let before = device.free_bytes().expect("a number");
        let options = manual().limit_bytes(1 << 46).chunk_bytes_max(128 << 20);
        let engine = Engine::new(&device, options).expect("an engine");
        let page = device.granularity_bytes();
        let pool = VirtualMemoryPool::on_engine(&engine, 1 << 40, page).expect("addresses");
        let mut live = 0;
        let error = loop {
            match pool.allocate(live, GIB) {
                Ok(_) => live += GIB,
                Err(error) => break error,
            }
            assert!(live <= before, "more than there was");
        };
        assert_eq!(
            error.driver_code(),
            Some(CUDA_ERROR_OUT_OF_MEMORY),
            "{error}"
        );
        assert!(error.is_out_of_memory() && error.is_later());
        assert!(before - live < 2 * GIB, "{live} of {before} bytes were had");
        let stats = engine.stats();
        assert_eq!(stats.live_bytes, live);
        assert_eq!(stats.committed_bytes, live);
        assert_eq!(stats.parts_bytes(), live);
        assert_eq!(pool.physical_memory_usage(), live);
        assert!(!pool.is_mapped(live, 1));
        let full = device.free_bytes().expect("a number");
        let again = pool.allocate(live, GIB).expect_err("still full");
        assert_eq!(again.driver_code(), Some(CUDA_ERROR_OUT_OF_MEMORY));
        assert_eq!(engine.stats(), stats, "unchanged by the failed call");
        assert_eq!(device.free_bytes(), Ok(full));
        pool.deallocate(0, live).expect("live");
        device.synchronize().expect("done");
        engine.step();
        assert_eq!(engine.stats().committed_bytes, 0);
        pool.close().expect("closed");
        drop(engine);
        assert_eq!(device.quarantined_bytes(), 0);
        if device.driver().kind() == DriverKind::Simulated {
            assert_eq!(device.free_bytes(), Ok(before));
        }
    });
}
