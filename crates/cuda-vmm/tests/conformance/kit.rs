//! The fresh state that a case runs in, and what its calls answered.

use crate::common::{under_test, with_context};
use cuda_vmm::Device;
use cuda_vmm::sys::*;
use std::ffi::{CStr, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::without_provenance_mut;

/// Makes a call of the driver's table and returns its code.
macro_rules! call {
    ($kit:expr, $name:ident($($argument:expr),* $(,)?)) => {
        // SAFETY: places for results are references, device addresses are the case's own or are
        // only looked up, and handles are alive: no case passes one that it has destroyed or
        // released.
        unsafe { ($kit.table.$name)($($argument),*) }
    };
}
pub(crate) use call;

/// A stream, an event or a graph, which threads may hand to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Object(usize);

impl Object {
    /// The legacy default stream.
    pub const LEGACY: Self = Self(0);

    pub fn new<T>(pointer: *mut T) -> Self {
        Self(pointer.expose_provenance())
    }

    /// The handle as the driver gave it.
    pub fn raw<T>(self) -> *mut T {
        core::ptr::with_exposed_provenance_mut(self.0)
    }
}

/// Where the memory of a device is.
pub fn location(device: c_int) -> CUmemLocation {
    // SAFETY: the struct holds integers, for which zero is valid.
    let mut location: CUmemLocation = unsafe { core::mem::zeroed() };
    location.type_ = CU_MEM_LOCATION_TYPE_DEVICE;
    location.id = device;
    location
}

/// Pinned memory of a device.
pub fn properties(device: c_int) -> CUmemAllocationProp {
    // SAFETY: the struct holds integers and a pointer, for which all zeros is valid.
    let mut properties: CUmemAllocationProp = unsafe { core::mem::zeroed() };
    properties.type_ = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location = location(device);
    properties
}

/// An access descriptor.
pub fn descriptor(device: c_int, flags: CUmemAccess_flags) -> CUmemAccessDesc {
    CUmemAccessDesc {
        location: location(device),
        flags,
    }
}

/// One case's state: what it made, all of which [`finish`](Self::finish) takes away, and its
/// answers.
///
/// The device's context is current on the thread that runs the case.
pub struct Kit {
    pub device: Device,
    pub table: DriverTable,
    /// The size of what cases map, in bytes: the granularity or a multiple of it.
    pub page: usize,
    answers: Vec<String>,
    reservations: Vec<(u64, usize)>,
    handles: Vec<u64>,
    streams: Vec<Object>,
    events: Vec<Object>,
}

impl Kit {
    /// Runs a case and returns its answers. What cannot be taken away afterwards is one more
    /// answer.
    pub fn run(device: &Device, run: &dyn Fn(&mut Self)) -> Vec<String> {
        Self::run_with(device, *device.driver().table(), run)
    }

    /// The same with another table for the case's calls.
    pub fn run_with(device: &Device, table: DriverTable, run: &dyn Fn(&mut Self)) -> Vec<String> {
        with_context(device, || {
            let mut kit = Self {
                device: device.clone(),
                table,
                page: under_test().page_bytes,
                answers: Vec::new(),
                reservations: Vec::new(),
                handles: Vec::new(),
                streams: Vec::new(),
                events: Vec::new(),
            };
            // A case that stops half-way is a difference like any other, and the next ones still
            // run.
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(&mut kit))) {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
                let why = text.unwrap_or("a panic").replace('\n', " ");
                kit.answers.push(format!("stopped: {why}"));
            }
            kit.finish()
        })
    }

    /// The same for a case that poisons the context: what it made goes with the process.
    pub fn run_and_leave(device: &Device, run: &dyn Fn(&mut Self)) -> Vec<String> {
        Self::run(device, &|kit| {
            run(kit);
            kit.reservations.clear();
            kit.handles.clear();
            kit.streams.clear();
            kit.events.clear();
        })
    }

    /// The name of a code, without what all names begin with.
    pub fn name(&self, code: CUresult) -> String {
        let mut text = core::ptr::null();
        if call!(self, cuGetErrorName(code, &mut text)) != CUDA_SUCCESS || text.is_null() {
            return code.to_string();
        }
        // SAFETY: the driver's names are static C strings.
        let name = unsafe { CStr::from_ptr(text) }.to_string_lossy();
        let short = name.strip_prefix("CUDA_").unwrap_or(&name);
        short.strip_prefix("ERROR_").unwrap_or(short).to_owned()
    }

    /// Notes what a call answered.
    pub fn answer(&mut self, code: CUresult) {
        let name = self.name(code);
        self.answers.push(name);
    }

    /// Notes what else was seen.
    pub fn note(&mut self, seen: &str) {
        self.answers.push(seen.to_owned());
    }

    /// Notes what a page reads at its first and its last byte.
    pub fn read(&mut self, address: u64) {
        let mut ends = [0; 2];
        for (byte, at) in ends.iter_mut().zip([0, self.page - 1]) {
            let place = (&raw mut *byte).cast();
            let code = call!(self, cuMemcpyDtoH(place, address + at as u64, 1));
            if code != CUDA_SUCCESS {
                return self.answer(code);
            }
        }
        self.answers.push(match ends {
            [first, last] if first == last => format!("reads {first}"),
            [first, last] => format!("reads {first} to {last}"),
        });
    }

    /// Stops the case unless a call that it builds on succeeded.
    #[track_caller]
    pub fn must(&self, code: CUresult) {
        let caller = std::panic::Location::caller();
        assert_eq!(code, CUDA_SUCCESS, "{} at {caller}", self.name(code));
    }

    pub fn try_reserve(&mut self, bytes: usize, alignment: usize, flags: u64) -> CUresult {
        let mut address = 0;
        let code = call!(
            self,
            cuMemAddressReserve(&mut address, bytes, alignment, 0, flags)
        );
        if code == CUDA_SUCCESS {
            self.reservations.push((address, bytes));
        }
        code
    }

    pub fn try_create(&mut self, bytes: usize, device: c_int, flags: u64) -> CUresult {
        let mut handle = 0;
        let properties = properties(device);
        let code = call!(self, cuMemCreate(&mut handle, bytes, &properties, flags));
        if code == CUDA_SUCCESS {
            self.handles.push(handle);
        }
        code
    }

    pub fn try_map(&self, address: u64, bytes: usize, offset: usize, handle: u64) -> CUresult {
        call!(self, cuMemMap(address, bytes, offset, handle, 0))
    }

    pub fn try_open(&self, address: u64, bytes: usize) -> CUresult {
        let access = descriptor(self.device.raw(), CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
        call!(self, cuMemSetAccess(address, bytes, &access, 1))
    }

    pub fn unmap(&self, address: u64, bytes: usize) -> CUresult {
        call!(self, cuMemUnmap(address, bytes))
    }

    pub fn free(&mut self, address: u64, bytes: usize) -> CUresult {
        let code = call!(self, cuMemAddressFree(address, bytes));
        if code == CUDA_SUCCESS {
            self.reservations.retain(|&(base, _)| base != address);
        }
        code
    }

    pub fn release(&mut self, handle: u64) -> CUresult {
        let code = call!(self, cuMemRelease(handle));
        if code == CUDA_SUCCESS {
            let at = self.handles.iter().position(|&other| other == handle);
            at.map(|at| self.handles.swap_remove(at));
        }
        code
    }

    /// Takes up a handle that the case was given otherwise than by creating it.
    pub fn own(&mut self, handle: u64) {
        self.handles.push(handle);
    }

    /// Reserves this many pages.
    pub fn addresses(&mut self, pages: usize) -> u64 {
        let code = self.try_reserve(pages * self.page, 0, 0);
        self.must(code);
        self.reservations.last().expect("just reserved").0
    }

    /// Creates this many pages of memory under one handle.
    pub fn memory(&mut self, pages: usize) -> u64 {
        let code = self.try_create(pages * self.page, self.device.raw(), 0);
        self.must(code);
        self.last_handle()
    }

    /// What was created last.
    pub fn last_handle(&self) -> u64 {
        *self.handles.last().expect("something was created")
    }

    /// Maps all of a handle of this many pages, without access.
    pub fn map(&self, address: u64, pages: usize, handle: u64) {
        self.must(self.try_map(address, pages * self.page, 0, handle));
    }

    /// Lets the device read and write these pages.
    pub fn open(&self, address: u64, pages: usize) {
        self.must(self.try_open(address, pages * self.page));
    }

    /// Creates memory, maps it and opens it; returns its handle.
    pub fn back(&mut self, address: u64, pages: usize) -> u64 {
        let handle = self.memory(pages);
        self.map(address, pages, handle);
        self.open(address, pages);
        handle
    }

    /// Sets every byte of a page and waits.
    pub fn fill(&self, address: u64, value: u8) {
        self.must(call!(self, cuMemsetD8(address, value, self.page)));
        self.must(call!(self, cuCtxSynchronize()));
    }

    /// A stream that waits for no other.
    pub fn stream(&mut self) -> Object {
        self.stream_with(CU_STREAM_NON_BLOCKING)
    }

    pub fn stream_with(&mut self, flags: CUstream_flags) -> Object {
        let mut stream = core::ptr::null_mut();
        self.must(call!(self, cuStreamCreate(&mut stream, flags as _)));
        let stream = Object::new(stream);
        self.streams.push(stream);
        stream
    }

    pub fn event(&mut self) -> Object {
        let mut event = core::ptr::null_mut();
        let flags = CU_EVENT_DISABLE_TIMING as _;
        self.must(call!(self, cuEventCreate(&mut event, flags)));
        let event = Object::new(event);
        self.events.push(event);
        event
    }

    /// The code of a look-up of the memory at an address, and the handle, which then is the case's
    /// own.
    pub fn retain(&mut self, address: u64) -> (CUresult, u64) {
        let mut handle = 0;
        let pointer = without_provenance_mut(address as usize);
        let code = call!(self, cuMemRetainAllocationHandle(&mut handle, pointer));
        if code == CUDA_SUCCESS {
            self.own(handle);
        }
        (code, handle)
    }

    fn finish(mut self) -> Vec<String> {
        let mut undone = Vec::new();
        for stream in core::mem::take(&mut self.streams) {
            undone.push((
                "cuStreamDestroy",
                call!(self, cuStreamDestroy(stream.raw())),
            ));
        }
        // A memset of device memory returns before it is done, on the legacy stream too. A poisoned
        // context has nothing under way any more, and cases that poison it leave nothing here.
        if !undone.is_empty() || !self.reservations.is_empty() {
            undone.push(("cuCtxSynchronize", call!(self, cuCtxSynchronize())));
        }
        for event in core::mem::take(&mut self.events) {
            undone.push(("cuEventDestroy", call!(self, cuEventDestroy(event.raw()))));
        }
        for (address, bytes) in core::mem::take(&mut self.reservations) {
            undone.push(("cuMemUnmap", self.unmap(address, bytes)));
            undone.push(("cuMemAddressFree", self.free(address, bytes)));
        }
        for handle in core::mem::take(&mut self.handles) {
            undone.push(("cuMemRelease", self.release(handle)));
        }
        for (call, code) in undone {
            if code != CUDA_SUCCESS {
                let answer = format!("clean-up: {call} {}", self.name(code));
                self.answers.push(answer);
            }
        }
        self.answers
    }
}
