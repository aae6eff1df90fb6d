//! The simulator as the program that owns it sees it.

use crate::fault::Fault;
use crate::host_memory;
use crate::slot;
use crate::state::State;
use crate::thread::ThreadKey;
use crate::{Books, SimConfig};
use cuda_vmm_sys::{DriverFunction, DriverTable};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Why there is no simulator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SimError {
    /// As many simulators live in this process as it has tables for.
    #[error("{limit} simulated drivers are alive in this process, which is the limit")]
    TooMany {
        /// How many there may be.
        limit: usize,
    },
    /// As many interposers live in this process as it has tables for.
    #[error("{limit} interposers are alive in this process, which is the limit")]
    TooManyInterposers {
        /// How many there may be.
        limit: usize,
    },
    /// A value of the configuration is not possible.
    #[error("{what} cannot be {value}")]
    InvalidConfig {
        /// Which value.
        what: &'static str,
        /// The value.
        value: usize,
    },
    /// This operating system has no memory of the kind that simulated devices are made of.
    #[error("the simulated CUDA driver is supported on Linux only")]
    Unsupported,
}

/// A simulated driver. Clones are the same one; it ends when the last clone is dropped.
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
            // A forked process has none of the streams' threads to wait for, and their locks may be
            // held for good. Nothing is given back there: the process's end does that.
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

/// Numbers simulators. 0 is that of none.
static MADE: AtomicU64 = AtomicU64::new(1);

impl Simulator {
    /// How many simulators may be alive in a process.
    pub const LIMIT: usize = slot::SLOTS;

    /// Makes a simulated driver. As with a real one, calls fail until `cuInit` was called.
    ///
    /// # Errors
    /// [`SimError::TooMany`] while [`LIMIT`](Self::LIMIT) others are alive, [`SimError::InvalidConfig`]
    /// for a configuration that cannot be, [`SimError::Unsupported`] where the system is not Linux.
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

    /// The driver's functions, answered by this simulator. They are valid for good, but once the last
    /// clone is dropped they answer `CUDA_ERROR_DEINITIALIZED`, or reach a later simulator that was given
    /// the same table: keep a clone beside the table.
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

    /// Forgets all faults.
    pub fn clear_faults(&self) {
        self.owner.state.lock().faults.clear();
    }

    /// How many calls of an entry point there have been, failed ones too.
    pub fn calls(&self, function: DriverFunction) -> u64 {
        self.owner.state.lock().calls(function)
    }

    /// Starts an empty trace of the entry points that [`Fault::nth_call`] counts.
    pub fn start_trace(&self) {
        self.owner.state.lock().start_trace();
    }

    /// Ends the trace: the calls of all threads since [`start_trace`](Self::start_trace), in order.
    pub fn take_trace(&self) -> Vec<DriverFunction> {
        self.owner.state.lock().take_trace()
    }

    /// What a device holds; nothing if there is no device of this number.
    pub fn books(&self, device: usize) -> Books {
        let state = &self.owner.state;
        match device < state.config.devices {
            true => state.lock().books(device),
            false => Books::default(),
        }
    }

    /// Whether work on a device touched memory that it may not touch, so that its context answers
    /// `CUDA_ERROR_ILLEGAL_ADDRESS` for good.
    pub fn is_poisoned(&self, device: usize) -> bool {
        let state = &self.owner.state;
        device < state.config.devices && state.lock().contexts.poison(device).is_some()
    }

    /// Lets no more work start on any stream. What is enqueued waits, queries answer
    /// `CUDA_ERROR_NOT_READY`, and calls that wait block. Work that is running goes on.
    pub fn hold_work(&self) {
        self.owner.state.lock().held = true;
    }

    /// Lets held work start.
    pub fn release_work(&self) {
        self.owner.state.lock().held = false;
        self.owner.state.notify();
    }

    /// The calling thread's virtual clock, in nanoseconds; 0 without a cost model.
    pub fn thread_clock_ns(&self) -> u64 {
        self.owner.state.threads.get().clock_ns
    }

    /// Moves the calling thread's virtual clock forward, as work of its own would; without effect if
    /// there is no cost model.
    pub fn advance_thread_clock_ns(&self, ns: u64) {
        let state = &self.owner.state;
        if state.config.cost_model.is_some() {
            state
                .threads
                .update(|thread| thread.clock_ns = thread.clock_ns.saturating_add(ns));
        }
    }
}
