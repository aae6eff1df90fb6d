//! What the driver remembers for each calling thread.

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
    /// By slot; an entry of an earlier simulator in the same slot is replaced when it is met.
    static THREADS: RefCell<Vec<ThreadState>> = const { RefCell::new(Vec::new()) };
}

/// Which simulator a thread's state belongs to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ThreadKey {
    /// The slot of the simulator's table.
    pub(crate) slot: usize,
    /// The simulator's number, never used twice in a process.
    pub(crate) simulator: u64,
}

impl ThreadKey {
    /// A copy of the calling thread's state; a fresh one on a thread that is being torn down.
    pub(crate) fn get(self) -> ThreadState {
        THREADS
            .try_with(|threads| threads.borrow().get(self.slot).copied())
            .ok()
            .flatten()
            .filter(|state| state.simulator == self.simulator)
            .unwrap_or(ThreadState::new(self.simulator))
    }

    /// Changes the calling thread's state; without effect on a thread that is being torn down.
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
