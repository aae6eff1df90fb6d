//! What the scripted driver knows: what each thread holds, what runs, and the first thing that was
//! illegal.
//!
//! A driver's functions have no context pointer, and tests run beside each other. All threads of
//! one execution are tasks on one thread of the operating system, so the books are that thread's.
//! They are borrowed for a moment only, never where another task could go on.

use core::ops::Range;
use cuda_vmm::sys::{CUDA_SUCCESS, CUresult, DriverFunction};
use shuttle::thread::Thread;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

/// The granularity of the scripted device, in bytes.
pub const PAGE: usize = 2 << 20;
/// The one context.
pub const CONTEXT: usize = 0xC0;

std::thread_local! {
    static BOOKS: RefCell<Books> = RefCell::default();
}

/// Looks at the books of this execution, or changes them. Must not reach a driver call or a lock.
pub fn books<T>(look: impl FnOnce(&mut Books) -> T) -> T {
    BOOKS.with_borrow_mut(look)
}

/// The task that calls.
pub fn task() -> usize {
    shuttle::current::me().into()
}

/// Something queued on a stream and not finished yet.
#[derive(Debug)]
struct Work {
    stream: usize,
    /// Addresses that it uses; none for a mark in the queue.
    addresses: Range<u64>,
    /// Host addresses that it uses.
    host: Range<usize>,
    /// Work that must be finished before.
    after: Vec<u64>,
}

#[derive(Debug)]
struct Mapped {
    bytes: u64,
    handle: u64,
    accessible: bool,
}

/// A call that is to fail.
#[derive(Debug)]
struct Fault {
    call: DriverFunction,
    /// Calls of it that still work before.
    after: usize,
    code: CUresult,
}

/// Everything that the driver and its device hold.
#[derive(Debug, Default)]
pub struct Books {
    last: u64,
    /// Whether work on the same bytes must come one after the other. Not where bytes of a page that
    /// a neighbour keeps live go from one stream to another: there the caller orders them.
    pub in_order: bool,
    /// Bytes by handle.
    memory: BTreeMap<u64, u64>,
    mappings: BTreeMap<u64, Mapped>,
    /// Bytes by address.
    reservations: BTreeMap<u64, u64>,
    /// Bytes of host memory by address.
    registered: BTreeMap<usize, usize>,
    /// The most host memory that may be registered at any moment.
    pub host_limit_bytes: Option<usize>,
    streams: BTreeSet<usize>,
    /// Tasks that have unmapped something.
    pub unmapping: BTreeSet<usize>,
    /// The work that each event waits for, once it is recorded.
    events: BTreeMap<usize, Option<Vec<u64>>>,
    work: BTreeMap<u64, Work>,
    retained: usize,
    /// The context that is current on each task, where one is.
    pub current: BTreeMap<usize, usize>,
    /// The capture mode of each task, where it is not the first.
    pub capture_modes: BTreeMap<usize, u32>,
    capturing: usize,
    synchronising: usize,
    faults: Vec<Fault>,
    /// Calls that get no further, and the one task for which they do.
    held: Option<(DriverFunction, usize)>,
    /// Whether the device finishes nothing for now.
    pub paused: bool,
    /// Whether the device's task is to end.
    pub ending: bool,
    /// The device's task, to be told of new work.
    pub device: Option<Thread>,
    /// The most that the device may ever hold, in bytes.
    pub limit_bytes: Option<u64>,
    /// Calls of each function.
    pub calls: BTreeMap<DriverFunction, usize>,
    /// The first illegal thing that happened.
    illegal: Option<String>,
}

impl Books {
    fn number(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    /// Notes something that CUDA forbids. The test fails by it when the execution ends: a C
    /// function cannot panic.
    pub fn forbid(&mut self, what: String) {
        self.illegal.get_or_insert(what);
    }

    /// Fails if anything illegal happened.
    pub fn assert_legal(&self) {
        if let Some(what) = &self.illegal {
            panic!("illegal: {what}");
        }
    }

    /// Whether nothing is held any more and every task has its own context and mode back.
    pub fn is_empty(&self) -> bool {
        self.memory.is_empty()
            && self.mappings.is_empty()
            && self.reservations.is_empty()
            && self.registered.is_empty()
            && self.streams.is_empty()
            && self.events.is_empty()
            && self.retained == 0
            && self.current.is_empty()
            && self.capture_modes.is_empty()
    }

    /// Whether these addresses are reserved.
    pub fn is_reserved(&self, address: u64) -> bool {
        self.reservations.contains_key(&address)
    }

    /// Bytes that the device holds.
    pub fn physical_bytes(&self) -> u64 {
        self.memory.values().sum()
    }

    /// Lets the call of this number from now on fail, once.
    pub fn fail(&mut self, call: DriverFunction, after: usize, code: CUresult) {
        self.faults.push(Fault { call, after, code });
    }

    /// Forgets the failures that have not come about.
    pub fn fail_no_more(&mut self) {
        self.faults.clear();
    }

    /// Counts a call, and answers what it is told to.
    pub fn begin(&mut self, call: DriverFunction) -> CUresult {
        *self.calls.entry(call).or_default() += 1;
        let mut code = CUDA_SUCCESS;
        self.faults.retain_mut(|fault| {
            if fault.call != call {
                return true;
            }
            if fault.after > 0 {
                fault.after -= 1;
                return true;
            }
            code = fault.code;
            false
        });
        code
    }

    /// Keeps this call from getting any further, for all tasks but the one that says so.
    pub fn hold(&mut self, call: DriverFunction) {
        self.held = Some((call, task()));
    }

    /// Lets held calls go on.
    pub fn release(&mut self) {
        self.held = None;
    }

    /// Whether a call gets no further for now.
    pub fn is_held(&self, call: DriverFunction) -> bool {
        self.held
            .is_some_and(|(held, but)| held == call && but != task())
    }

    /// Fails the test if the context is not current on the task that calls.
    pub fn expect_current(&mut self, call: DriverFunction) {
        if self.current.get(&task()) != Some(&CONTEXT) {
            self.forbid(format!("{call} without a context"));
        }
    }

    pub fn retain(&mut self) {
        self.retained += 1;
    }

    pub fn release_context(&mut self) {
        match self.retained.checked_sub(1) {
            Some(retained) => self.retained = retained,
            None => self.forbid("the context was released twice".into()),
        }
    }

    pub fn reserve(&mut self, bytes: u64) -> u64 {
        // Addresses are used once, so that a stale one never looks right.
        let address = self.number() << 40;
        self.reservations.insert(address, bytes);
        address
    }

    pub fn free(&mut self, address: u64, bytes: u64) {
        if self.reservations.remove(&address) != Some(bytes) {
            self.forbid(format!("{address:#x} was freed but is no reservation"));
        }
        let mut mappings = self.mappings.range(address..address + bytes);
        if mappings.next().is_some() {
            self.forbid(format!("{address:#x} was freed with a mapping in it"));
        }
    }

    pub fn create(&mut self, bytes: u64) -> u64 {
        let handle = self.number();
        self.memory.insert(handle, bytes);
        let physical_bytes = self.physical_bytes();
        if self.limit_bytes.is_some_and(|limit| physical_bytes > limit) {
            self.forbid(format!("the device holds {physical_bytes} bytes"));
        }
        handle
    }

    pub fn register(&mut self, address: usize, bytes: usize) {
        let before = self.registered.range(..address + bytes).next_back();
        if before.is_some_and(|(start, length)| start + length > address) {
            self.forbid(format!("host memory at {address:#x} was registered twice"));
        }
        self.registered.insert(address, bytes);
        let all_bytes = self.registered.values().sum::<usize>();
        if self.host_limit_bytes.is_some_and(|limit| all_bytes > limit) {
            self.forbid(format!("{all_bytes} bytes of the host are registered"));
        }
    }

    pub fn unregister(&mut self, address: usize) {
        let Some(bytes) = self.registered.remove(&address) else {
            self.forbid(format!("host memory at {address:#x} is not registered"));
            return;
        };
        let in_use = |work: &Work| work.host.start < address + bytes && address < work.host.end;
        if self.work.values().any(in_use) {
            self.forbid(format!(
                "host memory at {address:#x} was unregistered under a copy"
            ));
        }
    }

    pub fn destroy(&mut self, handle: u64) {
        if self.memory.remove(&handle).is_none() {
            self.forbid(format!("memory {handle} was released twice"));
        }
        if self.mappings.values().any(|mapped| mapped.handle == handle) {
            self.forbid(format!("memory {handle} was released while it is mapped"));
        }
    }

    pub fn map(&mut self, address: u64, bytes: u64, handle: u64) {
        if self.memory.get(&handle) != Some(&bytes) {
            self.forbid(format!("memory {handle} was mapped but is not there"));
        }
        let reserved = self.reservations.range(..=address).next_back();
        if reserved.is_none_or(|(start, length)| address + bytes > start + length) {
            self.forbid(format!("{address:#x} was mapped but is not reserved"));
        }
        let before = self.mappings.range(..address + bytes).next_back();
        if before.is_some_and(|(start, mapped)| start + mapped.bytes > address) {
            self.forbid(format!("{address:#x} was mapped over a mapping"));
        }
        let mapped = Mapped {
            bytes,
            handle,
            accessible: false,
        };
        self.mappings.insert(address, mapped);
    }

    pub fn set_access(&mut self, address: u64, bytes: u64) {
        match self.mappings.get_mut(&address) {
            Some(mapped) if mapped.bytes == bytes => mapped.accessible = true,
            _ => self.forbid(format!("access was set for {address:#x}, no mapping")),
        }
    }

    pub fn unmap(&mut self, address: u64, bytes: u64) {
        self.unmapping.insert(task());
        let mapped = self.mappings.remove(&address);
        if mapped.is_none_or(|mapped| mapped.bytes != bytes) {
            self.forbid(format!("{address:#x} was unmapped but is no mapping"));
        }
        let addresses = address..address + bytes;
        let in_use = |work: &Work| {
            work.addresses.start < addresses.end && addresses.start < work.addresses.end
        };
        if self.work.values().any(in_use) {
            self.forbid(format!("{address:#x} was unmapped under running work"));
        }
    }

    pub fn open_stream(&mut self) -> usize {
        let stream = self.number() as usize + 0x100;
        self.streams.insert(stream);
        stream
    }

    pub fn close_stream(&mut self, stream: usize) {
        if !self.streams.remove(&stream) {
            self.forbid(format!("stream {stream} was destroyed twice"));
        }
    }

    /// Queues work on memory that must be there.
    pub fn launch(&mut self, stream: usize, addresses: Range<u64>) {
        let mut at = addresses.start;
        while at < addresses.end {
            match self.mappings.range(..=at).next_back() {
                Some((start, mapped)) if start + mapped.bytes > at && mapped.accessible => {
                    at = start + mapped.bytes;
                }
                _ => {
                    self.forbid(format!("work on {at:#x}, which is not mapped"));
                    break;
                }
            }
        }
        let overlaps = |work: &Work| {
            work.addresses.start < addresses.end && addresses.start < work.addresses.end
        };
        let others = self.work.iter();
        let others = others.filter(|(_, work)| work.stream != stream && overlaps(work));
        let racing: Vec<_> = others.map(|(id, _)| *id).collect();
        if self.in_order && racing.iter().any(|id| !self.comes_after(stream, *id)) {
            self.forbid(format!(
                "work on {:#x} that other work still uses",
                addresses.start
            ));
        }
        let id = self.number();
        let work = Work {
            stream,
            addresses,
            host: 0..0,
            after: Vec::new(),
        };
        self.work.insert(id, work);
    }

    /// Queues a copy between memory that must be there and registered host memory.
    pub fn copy(&mut self, stream: usize, addresses: Range<u64>, host: Range<usize>) {
        let registered = self.registered.range(..=host.start).next_back();
        if registered.is_none_or(|(start, bytes)| host.end > start + bytes) {
            self.forbid(format!("a copy with {host:#x?}, which is not registered"));
        }
        self.launch(stream, addresses);
        if let Some(mut work) = self.work.last_entry() {
            work.get_mut().host = host;
        }
    }

    /// Whether what is queued on a stream from now on waits for this work of another.
    fn comes_after(&self, stream: usize, id: u64) -> bool {
        let queued = self.work.values().filter(|work| work.stream == stream);
        let mut before: Vec<u64> = queued.flat_map(|work| work.after.clone()).collect();
        let mut seen = BTreeSet::new();
        while let Some(next) = before.pop() {
            if next == id {
                return true;
            }
            if let Some(work) = self.work.get(&next).filter(|_| seen.insert(next)) {
                before.extend(&work.after);
            }
        }
        false
    }

    /// Has a stream wait for what an event marks.
    pub fn wait(&mut self, stream: usize, event: usize) {
        let after = self.until(event);
        let id = self.number();
        let mark = Work {
            stream,
            addresses: 0..0,
            host: 0..0,
            after,
        };
        self.work.insert(id, mark);
    }

    /// What is queued now, on one stream or on all.
    pub fn queued(&self, stream: Option<usize>) -> Vec<u64> {
        let of = |work: &Work| stream.is_none_or(|stream| work.stream == stream);
        let queued = self.work.iter().filter(|(_, work)| of(work));
        queued.map(|(id, _)| *id).collect()
    }

    /// Whether none of this work is left.
    pub fn is_past(&self, work: &[u64]) -> bool {
        work.iter().all(|id| !self.work.contains_key(id))
    }

    /// Finishes the first work of some stream; false if there is none, or the device is paused.
    /// `choose` picks one of so many streams.
    pub fn finish_one(&mut self, choose: impl FnOnce(usize) -> usize) -> bool {
        // The first work of each stream, if it waits for nothing.
        let mut streams = BTreeSet::new();
        let firsts = self
            .work
            .iter()
            .filter(|(_, work)| streams.insert(work.stream));
        let ready = firsts.filter(|(_, work)| self.is_past(&work.after));
        let ready: Vec<_> = ready.map(|(id, _)| *id).collect();
        if self.paused || ready.is_empty() {
            return false;
        }
        let first = ready[choose(ready.len())];
        self.work.remove(&first).is_some()
    }

    pub fn open_event(&mut self) -> usize {
        let event = self.number() as usize + 0x100;
        self.events.insert(event, None);
        event
    }

    pub fn close_event(&mut self, event: usize) {
        if self.events.remove(&event).is_none() {
            self.forbid(format!("event {event} was destroyed twice"));
        }
    }

    /// Marks the end of what is queued on one stream or on all. The mark itself takes the device a
    /// moment.
    pub fn record(&mut self, event: usize, stream: Option<usize>) {
        if stream.is_none() {
            self.expect_no_capture("cuCtxRecordEvent");
        }
        let id = self.number();
        let mark = Work {
            stream: stream.unwrap_or_default(),
            addresses: 0..0,
            host: 0..0,
            after: Vec::new(),
        };
        self.work.insert(id, mark);
        let until = self.queued(stream);
        match self.events.get_mut(&event) {
            Some(known) => *known = Some(until),
            None => self.forbid(format!("event {event} was recorded but is gone")),
        }
    }

    /// What an event waits for.
    pub fn until(&mut self, event: usize) -> Vec<u64> {
        match self.events.get(&event) {
            Some(Some(until)) => until.clone(),
            _ => {
                self.forbid(format!(
                    "event {event} was asked but is gone or not recorded"
                ));
                Vec::new()
            }
        }
    }

    fn expect_no_capture(&mut self, what: &str) {
        if self.capturing > 0 {
            self.forbid(format!("{what} killed a capture"));
        }
    }

    /// A context synchronise begins; it waits for what is queued.
    pub fn begin_synchronise(&mut self) -> Vec<u64> {
        self.expect_no_capture("cuCtxSynchronize");
        self.synchronising += 1;
        self.queued(None)
    }

    pub fn end_synchronise(&mut self) {
        self.synchronising -= 1;
    }

    pub fn begin_capture(&mut self) {
        if self.synchronising > 0 {
            self.forbid("a capture began during a context synchronise".into());
        }
        self.capturing += 1;
    }

    pub fn end_capture(&mut self) {
        self.capturing -= 1;
    }
}
