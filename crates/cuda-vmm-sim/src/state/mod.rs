//! The state of one simulator, behind one lock.

pub(crate) mod address_space;
pub(crate) mod contexts;
pub(crate) mod events;
mod export;
pub(crate) mod graph_memory;
mod graph_range;
pub(crate) mod graphs;
pub(crate) mod physical;
pub(crate) mod registrations;
pub(crate) mod streams;
pub(crate) mod work;

use crate::fault::{FaultPlan, is_counted};
use crate::thread::ThreadKey;
use crate::{Books, CostModel, SimConfig};
use address_space::{AddressSpace, Kind};
use contexts::Contexts;
use cuda_vmm_sys::*;
use events::Events;
use graph_memory::GraphMemory;
use graphs::Graphs;
use physical::PhysicalMemory;
use registrations::Registrations;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use streams::Streams;

/// The result of a call: a value, or the driver's error code.
pub(crate) type DriverResult<T = ()> = Result<T, CUresult>;

/// A locked [`Inner`].
pub(crate) type Guard<'a> = MutexGuard<'a, Inner>;

/// One simulator.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) config: SimConfig,
    pub(crate) threads: ThreadKey,
    /// The process that made it. A forked process has none of its threads.
    process: u32,
    inner: Mutex<Inner>,
    /// Notified when work is added, released or completed, and when the simulator closes.
    changed: Condvar,
}

/// The state behind the lock.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) threads: ThreadKey,
    pub(crate) initialized: bool,
    /// The simulator is being dropped: no call waits, and no work starts.
    pub(crate) closing: bool,
    /// `hold_work` was called: no work starts.
    pub(crate) held: bool,
    pub(crate) faults: FaultPlan,
    calls: Vec<u64>,
    trace: Option<Vec<DriverFunction>>,
    pub(crate) physical: PhysicalMemory,
    pub(crate) space: AddressSpace,
    pub(crate) registrations: Registrations,
    pub(crate) contexts: Contexts,
    pub(crate) streams: Streams,
    pub(crate) events: Events,
    pub(crate) graphs: Graphs,
    pub(crate) graph_memory: GraphMemory,
    pub(crate) cost: Option<CostModel>,
    /// When the driver's virtual lock becomes free, in nanoseconds.
    driver_free_ns: u64,
}

impl State {
    pub(crate) fn new(config: SimConfig, threads: ThreadKey) -> Arc<Self> {
        let devices = config.devices;
        let mut streams = Streams::default();
        let inner = Inner {
            threads,
            initialized: false,
            closing: false,
            held: false,
            faults: FaultPlan::default(),
            calls: vec![0; DriverFunction::ALL.len()],
            trace: None,
            physical: PhysicalMemory::new(devices, config.memory_bytes, config.backed),
            space: AddressSpace::new(config.granularity_bytes, config.backed),
            registrations: Registrations::default(),
            contexts: Contexts::new(devices),
            events: Events::default(),
            graphs: Graphs::default(),
            graph_memory: GraphMemory::new(devices),
            cost: config.cost_model.clone(),
            driver_free_ns: 0,
            streams: {
                streams.add_legacy(devices);
                streams
            },
        };
        Arc::new(Self {
            config,
            threads,
            process: std::process::id(),
            inner: Mutex::new(inner),
            changed: Condvar::new(),
        })
    }

    pub(crate) fn lock(&self) -> Guard<'_> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the next change.
    pub(crate) fn wait<'a>(&self, guard: Guard<'a>) -> Guard<'a> {
        self.changed
            .wait(guard)
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn notify(&self) {
        self.changed.notify_all();
    }

    /// Begins every call: counts and traces it, applies the fault plan, and checks that `cuInit`
    /// was called.
    pub(crate) fn begin(&self, function: DriverFunction) -> DriverResult {
        let mut inner = self.lock();
        if inner.closing {
            return Err(CUDA_ERROR_DEINITIALIZED);
        }
        inner.calls[function as usize] += 1;
        if is_counted(function)
            && let Some(trace) = &mut inner.trace
        {
            trace.push(function);
        }
        if let Some(code) = inner.faults.call(function) {
            return Err(code);
        }
        use DriverFunction::*;
        let always = matches!(
            function,
            cuInit | cuDriverGetVersion | cuGetErrorName | cuGetErrorString
        );
        if always || inner.initialized {
            Ok(())
        } else {
            Err(CUDA_ERROR_NOT_INITIALIZED)
        }
    }

    /// `cuInit`.
    pub(crate) fn initialize(&self) -> DriverResult {
        if self.config.devices == 0 {
            return Err(CUDA_ERROR_NO_DEVICE);
        }
        self.lock().initialized = true;
        Ok(())
    }

    /// Converts the number of a device. Fails if it does not exist.
    pub(crate) fn device(&self, device: CUdevice) -> DriverResult<usize> {
        usize::try_from(device)
            .ok()
            .filter(|&device| device < self.config.devices)
            .ok_or(CUDA_ERROR_INVALID_DEVICE)
    }

    /// Returns whether this process made the simulator.
    pub(crate) fn is_own_process(&self) -> bool {
        self.process == std::process::id()
    }

    /// Stops the streams' threads and waits for them.
    pub(crate) fn close(&self) {
        let workers = {
            let mut inner = self.lock();
            inner.closing = true;
            inner.streams.take_workers()
        };
        self.notify();
        for worker in workers {
            // A host function may drop the last clone, on the thread itself. A thread cannot join
            // itself.
            if worker.thread().id() != std::thread::current().id() {
                let _ = worker.join();
            }
        }
    }
}

impl Inner {
    pub(crate) fn calls(&self, function: DriverFunction) -> u64 {
        self.calls[function as usize]
    }

    pub(crate) fn start_trace(&mut self) {
        self.trace = Some(Vec::new());
    }

    pub(crate) fn take_trace(&mut self) -> Vec<DriverFunction> {
        self.trace.take().unwrap_or_default()
    }

    /// Charges a call that takes the driver's lock.
    pub(crate) fn charge(&mut self, cost_ns: impl FnOnce(&CostModel) -> u64) {
        let Some(cost) = &self.cost else { return };
        let cost_ns = cost_ns(cost);
        let free_ns = &mut self.driver_free_ns;
        self.threads.update(|thread| {
            thread.clock_ns = thread.clock_ns.max(*free_ns) + cost_ns;
            *free_ns = thread.clock_ns;
        });
    }

    /// Returns the resources that a device holds.
    pub(crate) fn books(&self, device: usize) -> Books {
        let (reservations, reserved_bytes) = self.space.reserved();
        let (host_registrations, host_registered_bytes) = self.registrations.of_device(device);
        let mut books = Books {
            physical_bytes: self.physical.used_bytes(device),
            handles: self.physical.references(device),
            reservations,
            reserved_bytes,
            host_registrations,
            host_registered_bytes,
            streams: self.streams.created(device),
            events: self.events.count(device),
            graphs: self.graphs.count(device),
            context_retains: self.contexts.retains(device),
            ..Books::default()
        };
        for (_, range) in self.space.ranges() {
            match range.kind {
                Kind::Plain { device: owner, .. } if owner == device => {
                    books.plain_allocations += 1;
                    books.plain_bytes += range.bytes;
                }
                Kind::Mapping if self.physical.device_of(range.handle) == Some(device) => {
                    books.mappings += 1;
                    books.mapped_bytes += range.bytes;
                }
                _ => {}
            }
        }
        // A plain allocation has an internal handle, which is not counted.
        books.handles -= books.plain_allocations;
        books
    }
}
