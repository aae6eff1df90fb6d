//! Events: points in streams that can be queried and waited for.

use super::DriverResult;
use super::streams::Point;
use cuda_vmm_sys::*;
use std::collections::HashMap;
use std::time::Instant;

/// One event.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) device: usize,
    pub(crate) timed: bool,
    /// Number of records.
    pub(crate) records: u64,
    /// The work that the last record waits for.
    pub(crate) points: Vec<Point>,
    /// When the last record completed.
    pub(crate) done_at: Option<Instant>,
    /// When it completes on the virtual clocks, in nanoseconds.
    pub(crate) clock_ns: u64,
    /// The capture in which it was last recorded.
    pub(crate) capture: Option<u64>,
}

/// All events of one simulator. A handle is a number and is never dereferenced.
#[derive(Debug, Default)]
pub(crate) struct Events {
    pub(crate) by_key: HashMap<u64, Event>,
    pub(crate) made: u64,
}

pub(crate) const FIRST_KEY: u64 = 0xE700_0000;

impl Events {
    pub(crate) fn count(&self, device: usize) -> usize {
        self.by_key
            .values()
            .filter(|event| event.device == device)
            .count()
    }

    pub(crate) fn destroy_all(&mut self, device: usize) {
        self.by_key.retain(|_, event| event.device != device);
    }

    pub(crate) fn get(&mut self, handle: CUevent) -> DriverResult<&mut Event> {
        let event = self.by_key.get_mut(&(handle.addr() as u64));
        event.ok_or(CUDA_ERROR_INVALID_HANDLE)
    }

    /// Marks a record of an event as complete, if it is still the last one.
    pub(crate) fn done(&mut self, key: u64, record: u64) {
        let event = self.by_key.get_mut(&key);
        if let Some(event) = event.filter(|event| event.records == record) {
            event.done_at = Some(Instant::now());
        }
    }
}
