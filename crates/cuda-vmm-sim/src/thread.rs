//! The driver's state of each calling thread.

use cuda_vmm_sys::{CU_STREAM_CAPTURE_MODE_GLOBAL, CUstreamCaptureMode};
use std::cell::RefCell;

/// One thread's state in one simulator.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ThreadState {
    simulator: u64,
    /// The device whose primary context is current.
    pub(crate) current: Option<usize>,
    /// The mode that `cuThreadExchangeStreamCaptureMode` last set.
    pub(crate) capture_mode: CUstreamCaptureMode,
    /// The virtual clock, in nanoseconds.
    pub(crate) clock_ns: u64,
}

impl ThreadState {
    fn new(simulator: u64) -> Self {
        Self {
            simulator,
            current: None,
            capture_mode: CU_STREAM_CAPTURE_MODE_GLOBAL,
            clock_ns: 0,
        }
    }
}

thread_local! {
    /// Indexed by slot. The entry of an earlier simulator in the same slot is replaced on access.
    static THREADS: RefCell<Vec<ThreadState>> = const { RefCell::new(Vec::new()) };
}

/// Identifies the simulator that a thread's state belongs to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ThreadKey {
    /// The slot of the simulator's table.
    pub(crate) slot: usize,
    /// The simulator's number, unique in the process.
    pub(crate) simulator: u64,
}

impl ThreadKey {
    /// Returns a copy of the calling thread's state; a new one if the thread is exiting.
    pub(crate) fn get(self) -> ThreadState {
        THREADS
            .try_with(|threads| threads.borrow().get(self.slot).copied())
            .ok()
            .flatten()
            .filter(|state| state.simulator == self.simulator)
            .unwrap_or(ThreadState::new(self.simulator))
    }

    /// Changes the calling thread's state. Has no effect if the thread is exiting.
    pub(crate) fn update(self, change: impl FnOnce(&mut ThreadState)) {
        let mut state = self.get();
        change(&mut state);
        let _ = THREADS.try_with(|threads| {
            let mut threads = threads.borrow_mut();
            if threads.len() <= self.slot {
                threads.resize(self.slot + 1, ThreadState::new(0));
            }
            threads[self.slot] = state;
        });
    }
}
