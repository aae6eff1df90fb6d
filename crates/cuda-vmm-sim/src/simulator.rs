//! The simulator's interface.

use crate::fault::Fault;
use crate::host_memory;
use crate::slot;
use crate::state::State;
use crate::thread::ThreadKey;
use crate::{Books, SimConfig};
use cuda_vmm_sys::{DriverFunction, DriverTable};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Why a simulator or an interposer could not be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SimError {
    /// The process has as many simulators as it has tables for.
    #[error("{limit} simulated drivers are alive in this process, which is the limit")]
    TooMany {
        /// The limit.
        limit: usize,
    },
    /// The process has as many interposers as it has tables for.
    #[error("{limit} interposers are alive in this process, which is the limit")]
    TooManyInterposers {
        /// The limit.
        limit: usize,
    },
    /// A value of the configuration is invalid.
    #[error("{what} cannot be {value}")]
    InvalidConfig {
        /// Which value.
        what: &'static str,
        /// The value.
        value: usize,
    },
    /// This operating system lacks the kind of memory that simulated devices use.
    #[error("the simulated CUDA driver is supported on Linux only")]
    Unsupported,
}

/// A simulated driver. Clones share it. It ends when the last clone is dropped.
#[derive(Clone)]
pub struct Simulator {
    owner: Arc<Owner>,
}

struct Owner {
    state: Arc<State>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        if !self.state.is_own_process() {
            // A forked process has none of the streams' threads, and their locks may never be
            // released. So it frees nothing: the process's end does.
            std::mem::forget(Arc::clone(&self.state));
            return;
        }
        slot::vacate(self.state.threads.slot);
        self.state.close();
    }
}

impl std::fmt::Debug for Simulator {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Simulator")
            .field("config", &self.owner.state.config)
            .finish_non_exhaustive()
    }
}

/// The number of the next simulator. 0 is no simulator's number.
static MADE: AtomicU64 = AtomicU64::new(1);

impl Simulator {
    /// The most simulators that may be alive in a process.
    pub const LIMIT: usize = slot::SLOTS;

    /// Makes a simulated driver. As with a real one, calls fail until `cuInit` was called.
    ///
    /// # Errors
    /// - [`SimError::TooMany`] while [`LIMIT`](Self::LIMIT) others are alive.
    /// - [`SimError::InvalidConfig`] if a value of the configuration is invalid.
    /// - [`SimError::Unsupported`] if the system is not Linux.
    pub fn new(config: SimConfig) -> Result<Self, SimError> {
        if !host_memory::SUPPORTED {
            return Err(SimError::Unsupported);
        }
        let invalid = |what, value| Err(SimError::InvalidConfig { what, value });
        if config.devices > SimConfig::MAX_DEVICES {
            return invalid("the number of devices", config.devices);
        }
        let granularity = config.granularity_bytes;
        if !granularity.is_power_of_two() || granularity < host_memory::page_bytes() {
            return invalid("the granularity in bytes", granularity);
        }
        if config.memory_bytes > 1 << 46 {
            return invalid("the memory of a device in bytes", config.memory_bytes);
        }
        let simulator = MADE.fetch_add(1, Ordering::Relaxed);
        let state = slot::occupy(|slot| State::new(config, ThreadKey { slot, simulator }));
        let state = state.ok_or(SimError::TooMany { limit: Self::LIMIT })?;
        Ok(Self {
            owner: Arc::new(Owner { state }),
        })
    }

    /// Returns the driver's functions. Keep a clone of the simulator beside the table.
    ///
    /// The functions may be called at any time. After the last clone is dropped they return
    /// `CUDA_ERROR_DEINITIALIZED`, or call a later simulator that uses the same table.
    pub fn table(&self) -> DriverTable {
        let state = &self.owner.state;
        let mut table = slot::table(state.threads.slot);
        if state.config.driver_version < DriverFunction::cuCtxRecordEvent.version() {
            table.cuCtxRecordEvent = None;
        }
        table
    }

    /// Adds a fault to the plan.
    pub fn inject(&self, fault: Fault) {
        self.owner.state.lock().faults.add(fault);
    }

    /// Removes all faults.
    pub fn clear_faults(&self) {
        self.owner.state.lock().faults.clear();
    }

    /// Returns the number of calls of an entry point, including failed ones.
    pub fn calls(&self, function: DriverFunction) -> u64 {
        self.owner.state.lock().calls(function)
    }

    /// Starts an empty trace of the entry points that [`Fault::nth_call`] counts.
    pub fn start_trace(&self) {
        self.owner.state.lock().start_trace();
    }

    /// Ends the trace and returns it: the calls of all threads since
    /// [`start_trace`](Self::start_trace), in order.
    pub fn take_trace(&self) -> Vec<DriverFunction> {
        self.owner.state.lock().take_trace()
    }

    /// Returns the resources that a device holds; none if there is no device of this number.
    pub fn books(&self, device: usize) -> Books {
        let state = &self.owner.state;
        match device < state.config.devices {
            true => state.lock().books(device),
            false => Books::default(),
        }
    }

    /// Returns whether work on a device made an illegal access, so that its context returns
    /// `CUDA_ERROR_ILLEGAL_ADDRESS` from now on.
    pub fn is_poisoned(&self, device: usize) -> bool {
        let state = &self.owner.state;
        device < state.config.devices && state.lock().contexts.poison(device).is_some()
    }

    /// Stops work from starting on any stream.
    ///
    /// Enqueued work waits, queries return `CUDA_ERROR_NOT_READY`, and calls that wait block. Work
    /// that is already running completes.
    pub fn hold_work(&self) {
        self.owner.state.lock().held = true;
    }

    /// Lets held work start.
    pub fn release_work(&self) {
        self.owner.state.lock().held = false;
        self.owner.state.notify();
    }

    /// Returns the calling thread's virtual clock in nanoseconds; 0 without a cost model.
    pub fn thread_clock_ns(&self) -> u64 {
        self.owner.state.threads.get().clock_ns
    }

    /// Advances the calling thread's virtual clock, as the thread's own work would. Has no effect
    /// without a cost model.
    pub fn advance_thread_clock_ns(&self, ns: u64) {
        let state = &self.owner.state;
        if state.config.cost_model.is_some() {
            state
                .threads
                .update(|thread| thread.clock_ns = thread.clock_ns.saturating_add(ns));
        }
    }
}
