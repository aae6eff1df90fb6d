//! A table of driver calls that answers from the books.
//!
//! Each call whose effect another thread can see begins with a point at which the checker may let
//! others go on, so they run while this one is inside the driver.

use crate::books::{Books, CONTEXT, PAGE, books, task};
use core::ffi::{c_char, c_int, c_uchar, c_uint, c_ulonglong, c_void};
use core::ptr::without_provenance_mut;
use core::time::Duration;
use cuda_vmm::sys::*;
use cuda_vmm::{Driver, DriverKind};
use shuttle::thread;

macro_rules! define_table {
    (
        required { $(fn $name:ident($($argument:ident: $type:ty),*) = $pfn:ident, $version:literal;)* }
        optional { $(fn $optional:ident($($optional_argument:ident: $optional_type:ty),*) = $optional_pfn:ident, $optional_version:literal;)* }
    ) => {
        /// Every call is one that no thread should make.
        fn table() -> DriverTable {
            $(
                #[allow(non_snake_case)]
                unsafe extern "C" fn $name($(_: $type),*) -> CUresult {
                    unexpected(DriverFunction::$name)
                }
            )*
            DriverTable { $($name,)* $($optional: None,)* }
        }
    };
}
cuda_vmm::sys::driver_functions!(define_table);

fn unexpected(call: DriverFunction) -> CUresult {
    books(|books| books.forbid(format!("{call} is not in the script")));
    CUDA_ERROR_NOT_SUPPORTED
}

/// A call: a point at which others go on, a failure if one was asked for, and otherwise what it
/// does to the books.
fn call(function: DriverFunction, effect: impl FnOnce(&mut Books)) -> CUresult {
    thread::sleep(Duration::ZERO);
    while books(|books| books.is_held(function)) {
        thread::yield_now();
    }
    books(|books| {
        let code = books.begin(function);
        if code == CUDA_SUCCESS {
            effect(books);
        }
        code
    })
}

/// As [`call`], for one that needs the context.
fn call_in_context(function: DriverFunction, effect: impl FnOnce(&mut Books)) -> CUresult {
    call(function, |books| {
        books.expect_current(function);
        effect(books);
    })
}

/// Waits for the device.
fn until_past(work: &[u64]) {
    while !books(|books| books.is_past(work)) {
        thread::yield_now();
    }
}

/// Tells the device's task that there may be something to do.
pub fn ring() {
    if let Some(device) = books(|books| books.device.clone()) {
        device.unpark();
    }
}

/// Puts an answer where the caller wants it.
///
/// # Safety
/// `place` must be valid, as CUDA's contract asks of the caller.
unsafe fn put<T>(place: *mut T, value: T) {
    // SAFETY: the caller's promise.
    unsafe { place.write(value) };
}

unsafe extern "C" fn init(_: c_uint) -> CUresult {
    CUDA_SUCCESS
}

unsafe extern "C" fn new_version(version: *mut c_int) -> CUresult {
    // SAFETY: the crate passes a place on its stack to every call below that answers.
    unsafe { put(version, 13000) };
    CUDA_SUCCESS
}

unsafe extern "C" fn old_version(version: *mut c_int) -> CUresult {
    // SAFETY: as above.
    unsafe { put(version, 12000) };
    CUDA_SUCCESS
}

unsafe extern "C" fn one(count: *mut c_int) -> CUresult {
    // SAFETY: as above.
    unsafe { put(count, 1) };
    CUDA_SUCCESS
}

unsafe extern "C" fn error_name(_: CUresult, text: *mut *const c_char) -> CUresult {
    // SAFETY: as above.
    unsafe { put(text, c"scripted".as_ptr()) };
    CUDA_SUCCESS
}

unsafe extern "C" fn device(device: *mut CUdevice, _: c_int) -> CUresult {
    // SAFETY: as above.
    unsafe { put(device, 0) };
    CUDA_SUCCESS
}

unsafe extern "C" fn device_name(name: *mut c_char, _: c_int, _: CUdevice) -> CUresult {
    // SAFETY: the buffer has room for its end.
    unsafe { put(name, 0) };
    CUDA_SUCCESS
}

unsafe extern "C" fn attribute(value: *mut c_int, _: CUdevice_attribute, _: CUdevice) -> CUresult {
    // SAFETY: as above.
    unsafe { put(value, 1) };
    CUDA_SUCCESS
}

unsafe extern "C" fn total(bytes: *mut usize, _: CUdevice) -> CUresult {
    // SAFETY: as above.
    unsafe { put(bytes, 1 << 40) };
    CUDA_SUCCESS
}

unsafe extern "C" fn granularity(
    bytes: *mut usize,
    _: *const CUmemAllocationProp,
    _: CUmemAllocationGranularity_flags,
) -> CUresult {
    // SAFETY: as above.
    unsafe { put(bytes, PAGE) };
    CUDA_SUCCESS
}

unsafe extern "C" fn retain(context: *mut CUcontext, _: CUdevice) -> CUresult {
    // SAFETY: as above.
    unsafe { put(context, without_provenance_mut(CONTEXT)) };
    call(DriverFunction::cuDevicePrimaryCtxRetain, Books::retain)
}

unsafe extern "C" fn release_context(_: CUdevice) -> CUresult {
    call(
        DriverFunction::cuDevicePrimaryCtxRelease,
        Books::release_context,
    )
}

unsafe extern "C" fn get_current(context: *mut CUcontext) -> CUresult {
    let current = books(|books| books.current.get(&task()).copied());
    // SAFETY: as above.
    unsafe { put(context, without_provenance_mut(current.unwrap_or_default())) };
    CUDA_SUCCESS
}

unsafe extern "C" fn set_current(context: CUcontext) -> CUresult {
    books(|books| match context.addr() {
        0 => books.current.remove(&task()),
        context => books.current.insert(task(), context),
    });
    CUDA_SUCCESS
}

unsafe extern "C" fn exchange_mode(mode: *mut CUstreamCaptureMode) -> CUresult {
    // SAFETY: as above; the place holds the mode that is wanted.
    let wanted = unsafe { mode.read() };
    let before = books(|books| match wanted {
        CU_STREAM_CAPTURE_MODE_GLOBAL => books.capture_modes.remove(&task()),
        wanted => books.capture_modes.insert(task(), wanted),
    });
    // SAFETY: as above.
    unsafe { put(mode, before.unwrap_or(CU_STREAM_CAPTURE_MODE_GLOBAL)) };
    CUDA_SUCCESS
}

unsafe extern "C" fn synchronise() -> CUresult {
    let mut work = Vec::new();
    let code = call_in_context(DriverFunction::cuCtxSynchronize, |books| {
        work = books.begin_synchronise();
    });
    if code == CUDA_SUCCESS {
        until_past(&work);
        books(Books::end_synchronise);
    }
    code
}

unsafe extern "C" fn reserve(
    address: *mut CUdeviceptr,
    bytes: usize,
    _: usize,
    _: CUdeviceptr,
    _: c_ulonglong,
) -> CUresult {
    call(DriverFunction::cuMemAddressReserve, |books| {
        // SAFETY: as above.
        unsafe { put(address, books.reserve(bytes as u64)) };
    })
}

unsafe extern "C" fn free(address: CUdeviceptr, bytes: usize) -> CUresult {
    call(DriverFunction::cuMemAddressFree, |books| {
        books.free(address, bytes as u64);
    })
}

unsafe extern "C" fn create(
    handle: *mut CUmemGenericAllocationHandle,
    bytes: usize,
    _: *const CUmemAllocationProp,
    _: c_ulonglong,
) -> CUresult {
    call(DriverFunction::cuMemCreate, |books| {
        // SAFETY: as above.
        unsafe { put(handle, books.create(bytes as u64)) };
    })
}

unsafe extern "C" fn destroy(handle: CUmemGenericAllocationHandle) -> CUresult {
    call(DriverFunction::cuMemRelease, |books| books.destroy(handle))
}

unsafe extern "C" fn map(
    address: CUdeviceptr,
    bytes: usize,
    _: usize,
    handle: CUmemGenericAllocationHandle,
    _: c_ulonglong,
) -> CUresult {
    call(DriverFunction::cuMemMap, |books| {
        books.map(address, bytes as u64, handle);
    })
}

unsafe extern "C" fn set_access(
    address: CUdeviceptr,
    bytes: usize,
    _: *const CUmemAccessDesc,
    _: usize,
) -> CUresult {
    call(DriverFunction::cuMemSetAccess, |books| {
        books.set_access(address, bytes as u64);
    })
}

unsafe extern "C" fn unmap(address: CUdeviceptr, bytes: usize) -> CUresult {
    call(DriverFunction::cuMemUnmap, |books| {
        books.unmap(address, bytes as u64);
    })
}

unsafe extern "C" fn stream_create(stream: *mut CUstream, _: c_uint) -> CUresult {
    call_in_context(DriverFunction::cuStreamCreate, |books| {
        // SAFETY: as above.
        unsafe { put(stream, without_provenance_mut(books.open_stream())) };
    })
}

unsafe extern "C" fn stream_destroy(stream: CUstream) -> CUresult {
    call_in_context(DriverFunction::cuStreamDestroy, |books| {
        books.close_stream(stream.addr());
    })
}

unsafe extern "C" fn is_capturing(_: CUstream, status: *mut CUstreamCaptureStatus) -> CUresult {
    call_in_context(DriverFunction::cuStreamIsCapturing, |_| {
        // SAFETY: as above.
        unsafe { put(status, CU_STREAM_CAPTURE_STATUS_NONE) };
    })
}

unsafe extern "C" fn set_bytes(
    address: CUdeviceptr,
    _: c_uchar,
    bytes: usize,
    stream: CUstream,
) -> CUresult {
    let code = call_in_context(DriverFunction::cuMemsetD8Async, |books| {
        books.launch(stream.addr(), address..address + bytes as u64);
    });
    ring();
    code
}

unsafe extern "C" fn copy_bytes(
    target: CUdeviceptr,
    source: CUdeviceptr,
    bytes: usize,
    stream: CUstream,
) -> CUresult {
    let code = call_in_context(DriverFunction::cuMemcpyDtoDAsync, |books| {
        for address in [source, target] {
            books.launch(stream.addr(), address..address + bytes as u64);
        }
    });
    ring();
    code
}

unsafe extern "C" fn copy_out(
    target: *mut c_void,
    source: CUdeviceptr,
    bytes: usize,
    stream: CUstream,
) -> CUresult {
    let code = call_in_context(DriverFunction::cuMemcpyDtoHAsync, |books| {
        let addresses = source..source + bytes as u64;
        books.copy(
            stream.addr(),
            addresses,
            target.addr()..target.addr() + bytes,
        );
    });
    ring();
    code
}

unsafe extern "C" fn copy_in(
    target: CUdeviceptr,
    source: *const c_void,
    bytes: usize,
    stream: CUstream,
) -> CUresult {
    let code = call_in_context(DriverFunction::cuMemcpyHtoDAsync, |books| {
        let addresses = target..target + bytes as u64;
        books.copy(
            stream.addr(),
            addresses,
            source.addr()..source.addr() + bytes,
        );
    });
    ring();
    code
}

unsafe extern "C" fn stream_synchronise(stream: CUstream) -> CUresult {
    let mut until = Vec::new();
    let code = call_in_context(DriverFunction::cuStreamSynchronize, |books| {
        expect_relaxed(books, DriverFunction::cuStreamSynchronize);
        until = books.queued(Some(stream.addr()));
    });
    until_past(&until);
    code
}

unsafe extern "C" fn stream_query(stream: CUstream) -> CUresult {
    let mut past = true;
    let code = call_in_context(DriverFunction::cuStreamQuery, |books| {
        expect_relaxed(books, DriverFunction::cuStreamQuery);
        let queued = books.queued(Some(stream.addr()));
        past = books.is_past(&queued);
    });
    match (code, past) {
        (CUDA_SUCCESS, false) => CUDA_ERROR_NOT_READY,
        (code, _) => code,
    }
}

unsafe extern "C" fn stream_wait(stream: CUstream, event: CUevent, _: c_uint) -> CUresult {
    let code = call_in_context(DriverFunction::cuStreamWaitEvent, |books| {
        books.wait(stream.addr(), event.addr());
    });
    ring();
    code
}

unsafe extern "C" fn event_create(event: *mut CUevent, _: c_uint) -> CUresult {
    call_in_context(DriverFunction::cuEventCreate, |books| {
        // SAFETY: as above.
        unsafe { put(event, without_provenance_mut(books.open_event())) };
    })
}

unsafe extern "C" fn event_destroy(event: CUevent) -> CUresult {
    call_in_context(DriverFunction::cuEventDestroy, |books| {
        books.close_event(event.addr());
    })
}

unsafe extern "C" fn event_record(event: CUevent, stream: CUstream) -> CUresult {
    let code = call_in_context(DriverFunction::cuEventRecord, |books| {
        books.record(event.addr(), Some(stream.addr()));
    });
    ring();
    code
}

unsafe extern "C" fn context_record(_: CUcontext, event: CUevent) -> CUresult {
    let code = call_in_context(DriverFunction::cuCtxRecordEvent, |books| {
        books.record(event.addr(), None);
    });
    ring();
    code
}

fn expect_relaxed(books: &mut Books, what: DriverFunction) {
    if books.capture_modes.get(&task()) != Some(&CU_STREAM_CAPTURE_MODE_RELAXED) {
        books.forbid(format!("{what} could kill a capture"));
    }
}

unsafe extern "C" fn event_query(event: CUevent) -> CUresult {
    let mut past = true;
    let code = call_in_context(DriverFunction::cuEventQuery, |books| {
        expect_relaxed(books, DriverFunction::cuEventQuery);
        let until = books.until(event.addr());
        past = books.is_past(&until);
    });
    match (code, past) {
        (CUDA_SUCCESS, false) => CUDA_ERROR_NOT_READY,
        (code, _) => code,
    }
}

unsafe extern "C" fn event_synchronise(event: CUevent) -> CUresult {
    let mut until = Vec::new();
    let code = call_in_context(DriverFunction::cuEventSynchronize, |books| {
        expect_relaxed(books, DriverFunction::cuEventSynchronize);
        until = books.until(event.addr());
    });
    until_past(&until);
    code
}

unsafe extern "C" fn register(address: *mut c_void, bytes: usize, _: c_uint) -> CUresult {
    call_in_context(DriverFunction::cuMemHostRegister, |books| {
        expect_relaxed(books, DriverFunction::cuMemHostRegister);
        books.register(address.addr(), bytes);
    })
}

unsafe extern "C" fn unregister(address: *mut c_void) -> CUresult {
    call_in_context(DriverFunction::cuMemHostUnregister, |books| {
        expect_relaxed(books, DriverFunction::cuMemHostUnregister);
        books.unregister(address.addr());
    })
}

/// A new driver that has `cuCtxRecordEvent`, or one of the time before.
pub fn open(new: bool) -> Driver {
    let table = DriverTable {
        cuInit: init,
        cuDriverGetVersion: if new { new_version } else { old_version },
        cuGetErrorName: error_name,
        cuDeviceGet: device,
        cuDeviceGetCount: one,
        cuDeviceGetName: device_name,
        cuDeviceGetAttribute: attribute,
        cuDeviceTotalMem: total,
        cuDevicePrimaryCtxRetain: retain,
        cuDevicePrimaryCtxRelease: release_context,
        cuCtxGetCurrent: get_current,
        cuCtxSetCurrent: set_current,
        cuCtxSynchronize: synchronise,
        cuCtxRecordEvent: new.then_some(context_record),
        cuThreadExchangeStreamCaptureMode: exchange_mode,
        cuMemGetAllocationGranularity: granularity,
        cuMemHostRegister: register,
        cuMemHostUnregister: unregister,
        cuMemAddressReserve: reserve,
        cuMemAddressFree: free,
        cuMemCreate: create,
        cuMemRelease: destroy,
        cuMemMap: map,
        cuMemSetAccess: set_access,
        cuMemUnmap: unmap,
        cuMemsetD8Async: set_bytes,
        cuMemcpyDtoDAsync: copy_bytes,
        cuMemcpyDtoHAsync: copy_out,
        cuMemcpyHtoDAsync: copy_in,
        cuStreamSynchronize: stream_synchronise,
        cuStreamQuery: stream_query,
        cuStreamWaitEvent: stream_wait,
        cuStreamCreate: stream_create,
        cuStreamDestroy: stream_destroy,
        cuStreamIsCapturing: is_capturing,
        cuEventCreate: event_create,
        cuEventDestroy: event_destroy,
        cuEventRecord: event_record,
        cuEventQuery: event_query,
        cuEventSynchronize: event_synchronise,
        ..table()
    };
    // SAFETY: the functions are static and write nothing but their answers; no memory is behind the
    // addresses, and nothing here touches any.
    unsafe { Driver::from_table(table, DriverKind::Simulated) }.expect("no call fails")
}
