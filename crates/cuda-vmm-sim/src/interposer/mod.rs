//! Wraps the table of any driver.

mod entry;
mod holdings;

use crate::fault::{Fault, FaultPlan, is_counted};
use crate::{Books, SimError};
use cuda_vmm_sys::{CUresult, DriverFunction, DriverTable};
use holdings::Holdings;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A driver's table with a fault plan, call counts and books in front of it. Clones share it.
///
/// Every call goes to the wrapped driver, unless a [`Fault`] fails it. So a real driver can be made
/// to fail like a simulated one. The books count exactly what a program holds of it; `cuMemGetInfo`
/// reports only memory, and that of all processes.
///
/// Free what was created through the table through the table. The interposer ends with its last
/// clone; then its functions return `CUDA_ERROR_DEINITIALIZED`.
#[derive(Clone, Debug)]
pub struct Interposer(Arc<Owner>);

#[derive(Debug)]
struct Owner {
    process: u32,
    slot: usize,
    state: Arc<State>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        if self.process != std::process::id() {
            // The lock may never be released, and the slot ends with the process.
            return;
        }
        entry::vacate(self.slot);
    }
}

#[derive(Debug)]
struct State {
    driver: DriverTable,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    faults: FaultPlan,
    calls: Vec<u64>,
    trace: Option<Vec<DriverFunction>>,
    holdings: Holdings,
}

impl Interposer {
    /// The most interposers that may be alive in a process.
    pub const LIMIT: usize = entry::SLOTS;

    /// Wraps `driver`.
    ///
    /// # Errors
    /// [`SimError::TooManyInterposers`] while [`LIMIT`](Self::LIMIT) others are alive.
    ///
    /// # Safety
    /// The functions of `driver` have the contracts of CUDA's functions of their names, and stay
    /// valid while this interposer or a clone of it lives.
    pub unsafe fn new(driver: DriverTable) -> Result<Self, SimError> {
        let state = Arc::new(State {
            driver,
            inner: Mutex::new(Inner {
                faults: FaultPlan::default(),
                calls: vec![0; DriverFunction::ALL.len()],
                trace: None,
                holdings: Holdings::default(),
            }),
        });
        let slot = entry::occupy(&state);
        let slot = slot.ok_or(SimError::TooManyInterposers { limit: Self::LIMIT })?;
        Ok(Self(Arc::new(Owner {
            process: std::process::id(),
            slot,
            state,
        })))
    }

    /// Returns the functions to call instead of the driver's. They call the driver while this
    /// interposer or a clone of it lives: keep one beside the table.
    pub fn table(&self) -> DriverTable {
        let mut table = entry::table(self.0.slot);
        if self.0.state.driver.cuCtxRecordEvent.is_none() {
            table.cuCtxRecordEvent = None;
        }
        table
    }

    /// Adds a fault to the plan. A call that it fails does not reach the driver.
    pub fn inject(&self, fault: Fault) {
        self.0.state.lock().faults.add(fault);
    }

    /// Removes all faults.
    pub fn clear_faults(&self) {
        self.0.state.lock().faults.clear();
    }

    /// Returns the number of calls of an entry point, including failed ones.
    pub fn calls(&self, function: DriverFunction) -> u64 {
        self.0.state.lock().calls[function as usize]
    }

    /// Starts an empty trace of the entry points that [`Fault::nth_call`] counts.
    pub fn start_trace(&self) {
        self.0.state.lock().trace = Some(Vec::new());
    }

    /// Ends the trace and returns it: the calls of all threads since
    /// [`start_trace`](Self::start_trace), in order.
    pub fn take_trace(&self) -> Vec<DriverFunction> {
        self.0.state.lock().trace.take().unwrap_or_default()
    }

    /// Returns the resources that were created through the table and not freed, on all devices
    /// together.
    ///
    /// `physical_bytes` is the memory of handles that are held or mapped, and of plain allocations.
    /// Memory that was imported from another process counts too. What a capture allocates does not:
    /// it is the graph's, and the driver reserves it for graphs at a launch.
    pub fn books(&self) -> Books {
        self.0.state.lock().holdings.books()
    }
}

impl State {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins every call: counts it, and returns the code of a fault that fails it.
    fn begin(&self, function: DriverFunction) -> Result<(), CUresult> {
        let mut inner = self.lock();
        inner.calls[function as usize] += 1;
        if is_counted(function)
            && let Some(trace) = &mut inner.trace
        {
            trace.push(function);
        }
        inner.faults.call(function).map_or(Ok(()), Err)
    }
}
