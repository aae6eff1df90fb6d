//! One budget on one device: who holds which physical memory.
//!
//! `pages`, `policy` and `ledger` are pure bookkeeping. This file joins them to the driver under three
//! rules: no lock is held over a driver call; what a failed call leaves is what was there before; nothing
//! is unmapped that the device may still use.

mod fill;
mod intervals;
mod ledger;
mod pages;
mod policy;
mod range;
mod retire;
mod stats;
mod worker;

pub(crate) use ledger::Quota;
pub(crate) use pages::Parts;
pub(crate) use range::{Place, RangeId, RangeStats};
pub use stats::{EngineStats, StepReport};
pub use worker::WorkerMode;

use crate::{CaptureGuard, Device, Mapping, PhysicalMemory, Result, VmmError};
use ledger::{AccountId, Ledger};
use pages::ChunkState;
use range::Range;
use retire::{Queue, Until};
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use worker::Worker;

/// How an engine is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineOptions {
    /// The budget in bytes; the device's total where none is given. A limit above the device's memory is
    /// kept as given: then the driver says when there is no more.
    pub limit_bytes: Option<usize>,
    /// Memory of the device, in bytes, that the budget leaves alone, for other allocators in the process.
    pub headroom_bytes: usize,
    /// How much freed memory stays mapped, in bytes, to be taken back without a driver call.
    pub park_bytes_max: usize,
    /// The largest chunk in bytes. A page is the smallest chunk whatever this says, so 0, the default,
    /// means that each page has a chunk of its own and can be given back alone. Larger chunks take fewer
    /// driver calls, and a chunk is only given back whole.
    pub chunk_bytes_max: usize,
    /// Who takes the steps.
    pub worker: WorkerMode,
}

impl EngineOptions {
    /// The defaults: the device's total, no headroom, nothing parked, a chunk a page, a worker thread.
    pub const fn new() -> Self {
        Self {
            limit_bytes: None,
            headroom_bytes: 0,
            park_bytes_max: 0,
            chunk_bytes_max: 0,
            worker: WorkerMode::Thread,
        }
    }

    /// With a budget in bytes.
    pub const fn limit_bytes(mut self, bytes: usize) -> Self {
        self.limit_bytes = Some(bytes);
        self
    }

    /// With memory left for others, in bytes.
    pub const fn headroom_bytes(mut self, bytes: usize) -> Self {
        self.headroom_bytes = bytes;
        self
    }

    /// With freed memory kept mapped, up to this many bytes.
    pub const fn park_bytes_max(mut self, bytes: usize) -> Self {
        self.park_bytes_max = bytes;
        self
    }

    /// With chunks of up to this many bytes.
    pub const fn chunk_bytes_max(mut self, bytes: usize) -> Self {
        self.chunk_bytes_max = bytes;
        self
    }

    /// With this worker.
    pub const fn worker(mut self, worker: WorkerMode) -> Self {
        self.worker = worker;
        self
    }
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self::new()
    }
}

/// One budget on one device, shared by the ranges that are made on it; a cheap clone.
///
/// It lives until its last range is gone and its memory given back.
#[derive(Clone, Debug)]
pub struct Engine(Arc<Inner>);

#[derive(Debug)]
pub(crate) struct Inner {
    device: Device,
    options: EngineOptions,
    /// The limit as it was given, or the device's total.
    limit_bytes: usize,
    state: Mutex<State>,
    changed: Condvar,
    worker: Worker,
}

#[derive(Debug)]
struct State {
    ledger: Ledger,
    ranges: BTreeMap<RangeId, Range>,
    next_range: u64,
    queue: Queue,
    /// Memory that was unmapped but that the driver would not release.
    unreleased: Vec<(AccountId, PhysicalMemory)>,
    /// Bytes of it that are being released now, by a thread that has taken them out.
    releasing_bytes: usize,
    /// Threads that wait for `changed`.
    waiting: usize,
    /// Freed chunks whose fences are being recorded now.
    recording: usize,
}

impl State {
    fn parts(&self) -> EngineStats {
        let mut stats = EngineStats {
            committed_bytes: self.ledger.committed_bytes(),
            ranges: self.ranges.len(),
            retiring_bytes: self.releasing_bytes,
            quarantined_bytes: self
                .unreleased
                .iter()
                .map(|(_, memory)| memory.bytes())
                .sum(),
            ..EngineStats::default()
        };
        for range in self.ranges.values() {
            let parts = range.pages.parts();
            stats.live_bytes += parts.live_bytes;
            stats.slack_bytes += parts.slack_bytes;
            stats.filling_bytes += parts.filling_bytes;
            stats.retiring_bytes += parts.retiring_bytes;
            stats.parked_bytes += parts.parked_bytes;
            stats.quarantined_bytes += parts.quarantined_bytes;
            stats.chunks += range.pages.chunks();
        }
        stats
    }
}

impl Engine {
    /// An engine on this device.
    ///
    /// # Errors
    /// [`VmmError::ZeroSize`] for a limit of 0; [`VmmError::QuotaUnsatisfiable`] if the headroom leaves
    /// nothing.
    pub fn new(device: &Device, options: EngineOptions) -> Result<Self> {
        let limit_bytes = options.limit_bytes.unwrap_or(device.total_bytes());
        if limit_bytes == 0 {
            return Err(VmmError::ZeroSize { what: "limit" });
        }
        let mut budget_bytes = limit_bytes;
        if options.headroom_bytes > 0 {
            let available_bytes = device.total_bytes();
            if options.headroom_bytes >= available_bytes {
                return Err(VmmError::QuotaUnsatisfiable {
                    what: "headroom",
                    asked_bytes: options.headroom_bytes,
                    available_bytes,
                });
            }
            budget_bytes = budget_bytes.min(available_bytes - options.headroom_bytes);
        }
        let inner = Arc::new(Inner {
            device: device.clone(),
            options,
            limit_bytes,
            state: Mutex::new(State {
                ledger: Ledger::new(budget_bytes),
                ranges: BTreeMap::new(),
                next_range: 0,
                queue: Queue::default(),
                unreleased: Vec::new(),
                releasing_bytes: 0,
                waiting: 0,
                recording: 0,
            }),
            changed: Condvar::new(),
            worker: Worker::new(options.worker),
        });
        device.register_engine(&inner);
        Ok(Self(inner))
    }

    pub(crate) fn from_inner(inner: Arc<Inner>) -> Self {
        Self(inner)
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.0
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// The limit in bytes, as it was given.
    pub fn limit_bytes(&self) -> usize {
        self.0.limit_bytes
    }

    /// What it holds now; one moment's snapshot.
    pub fn stats(&self) -> EngineStats {
        let mut stats = self.0.lock().parts();
        stats.limit_bytes = self.0.limit_bytes;
        stats
    }

    /// Does the work that is due: looks which freed memory the device has finished with, synchronises the
    /// context where no stream was named (unless a capture is declared), gives back what is above
    /// `park_bytes_max`, and retries what the driver refused.
    ///
    /// With [`WorkerMode::Thread`] the engine's thread calls it. Waits for the device only where a context
    /// synchronise is due.
    ///
    /// In a forked process it does nothing.
    pub fn step(&self) -> StepReport {
        match self.0.check_process() {
            Ok(()) => self.0.step(),
            Err(_) => StepReport::default(),
        }
    }

    /// Gives back everything that is not live and that the device has finished with; returns the bytes.
    ///
    /// Waits for nothing: what is still retiring goes later.
    ///
    /// # Errors
    /// The driver's, if it refused; what it refused is in quarantine. [`VmmError::Forked`].
    pub fn trim(&self) -> Result<usize> {
        self.0.check_process()?;
        self.0.poll();
        self.0.retry();
        let (drained_bytes, outcome) = self.0.drain_parked(0, None);
        outcome.map(|()| drained_bytes)
    }
}

impl Inner {
    /// Fails in a forked process, where other threads' locks may be held for good and nothing that is
    /// waited for comes.
    fn check_process(&self) -> Result<()> {
        self.device.driver().check_process()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until something about the engine's memory has changed.
    fn wait<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.waiting += 1;
        let mut state = self
            .changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner);
        state.waiting -= 1;
        state
    }

    /// Lets go of the lock and wakes those who wait for a change.
    fn unlock_changed(&self, state: MutexGuard<'_, State>) {
        let waiting = state.waiting > 0;
        drop(state);
        if waiting {
            self.changed.notify_all();
        }
    }

    /// Whether a step would find something to do.
    fn has_work(&self) -> bool {
        let state = self.lock();
        let stats = state.parts();
        !state.queue.is_empty()
            || stats.parked_bytes > self.options.park_bytes_max
            || stats.quarantined_bytes > 0
            || state.ranges.values().any(|range| range.closed)
    }

    fn step(&self) -> StepReport {
        let mut retired_bytes = self.poll();
        if !self.lock().queue.unsynchronised().is_empty()
            && let Some(_no_capture) = CaptureGuard::try_none()
        {
            retired_bytes += self.synchronise();
        }
        let retried_bytes = self.retry();
        let (drained_bytes, _) = self.drain_parked(self.options.park_bytes_max, None);
        self.finish_closing();
        let stats = self.lock().parts();
        StepReport {
            retired_bytes,
            drained_bytes: retried_bytes + drained_bytes,
            retiring_bytes: stats.retiring_bytes,
            quarantined_bytes: stats.quarantined_bytes,
        }
    }

    /// Parks the chunks that the device has finished with, as far as fences tell; returns their bytes.
    /// Never waits.
    fn poll(&self) -> usize {
        let conditions = self.lock().queue.conditions();
        let past: Vec<u64> = conditions
            .into_iter()
            // A fence that cannot be asked now is asked again at the next step.
            .filter(|(_, until)| until.is_past().unwrap_or(false))
            .map(|(id, _)| id)
            .collect();
        self.park(&past)
    }

    /// Waits for all work of the context, then parks what waited for that. The caller has made sure that
    /// no capture is declared.
    fn synchronise(&self) -> usize {
        let waiting = self.lock().queue.unsynchronised();
        match self.device.synchronize_now() {
            Err(error) if !error.is_poisoned() => 0,
            // Done; or poisoned, and then nothing runs any more.
            _ => self.park(&waiting),
        }
    }

    fn park(&self, ids: &[u64]) -> usize {
        if ids.is_empty() {
            return 0;
        }
        let mut state = self.lock();
        let mut bytes = 0;
        let entries = state.queue.take(ids);
        for entry in &entries {
            if let Some(range) = state.ranges.get_mut(&entry.range) {
                for first in &entry.chunks {
                    bytes += range.pages.chunk_bytes(*first);
                    range.pages.park(*first);
                }
            }
        }
        self.unlock_changed(state);
        // The fences go here, without the lock: dropping them calls the driver.
        drop(entries);
        bytes
    }

    /// Unmaps and releases parked chunks, of one range or of all, until no more than `keep_bytes` are
    /// parked; returns the bytes that went, and the last error if the driver refused some.
    fn drain_parked(&self, keep_bytes: usize, only: Option<RangeId>) -> (usize, Result<()>) {
        let mut drained_bytes = 0;
        let mut outcome = Ok(());
        loop {
            let next = {
                let mut state = self.lock();
                let parked = state.parts().parked_bytes;
                if parked <= keep_bytes {
                    break;
                }
                let mut ranges = state
                    .ranges
                    .iter_mut()
                    .filter(|(id, _)| only.is_none_or(|only| **id == only));
                ranges.find_map(|(id, range)| {
                    let first = range.pages.parked().next()?;
                    Some((*id, first, range.pages.drain(first)?))
                })
            };
            let Some((id, first, mapping)) = next else {
                break;
            };
            match self.unmap(id, first, mapping) {
                Ok(bytes) => drained_bytes += bytes,
                Err(error) => outcome = Err(error),
            }
        }
        (drained_bytes, outcome)
    }

    /// Unmaps and releases one draining chunk. What the driver refuses stays charged, in quarantine.
    fn unmap(&self, id: RangeId, first: usize, mapping: Mapping) -> Result<usize> {
        let bytes = mapping.bytes();
        let unmapped = mapping.unmap();
        let released = match unmapped {
            Ok(memory) => Ok(Arc::into_inner(memory).map(PhysicalMemory::close)),
            Err(failure) => Err(failure),
        };
        let mut state = self.lock();
        let Some(range) = state.ranges.get_mut(&id) else {
            return Ok(0);
        };
        let account = range.account;
        let outcome = match released {
            Err(failure) => {
                range.pages.quarantine(first, failure.object);
                Err(failure.error)
            }
            Ok(closed) => {
                range.pages.drained(first);
                match closed {
                    Some(Err(failure)) => {
                        state.unreleased.push((account, failure.object));
                        Err(failure.error)
                    }
                    Some(Ok(())) | None => {
                        state.ledger.refund(account, bytes);
                        Ok(bytes)
                    }
                }
            }
        };
        self.unlock_changed(state);
        outcome
    }

    /// Tries again what the driver refused; returns the bytes that went.
    fn retry(&self) -> usize {
        let (unreleased, mapped) = {
            let mut state = self.lock();
            let unreleased = core::mem::take(&mut state.unreleased);
            state.releasing_bytes += unreleased
                .iter()
                .map(|(_, memory)| memory.bytes())
                .sum::<usize>();
            let mut mapped = Vec::new();
            for (id, range) in &mut state.ranges {
                for first in range.pages.in_state(ChunkState::Quarantined) {
                    mapped.extend(range.pages.drain(first).map(|memory| (*id, first, memory)));
                }
            }
            (unreleased, mapped)
        };
        let mut bytes = 0;
        for (account, memory) in unreleased {
            let freed = memory.bytes();
            let outcome = memory.close();
            let mut state = self.lock();
            state.releasing_bytes -= freed;
            match outcome {
                Ok(()) => {
                    state.ledger.refund(account, freed);
                    bytes += freed;
                }
                Err(failure) => state.unreleased.push((account, failure.object)),
            }
            self.unlock_changed(state);
        }
        for (id, first, mapping) in mapped {
            bytes += self.unmap(id, first, mapping).unwrap_or_default();
        }
        bytes
    }

    /// Records when the freed chunks of a range will be free of the device, and has it looked at.
    fn retire(self: &Arc<Self>, mut state: MutexGuard<'_, State>, id: RangeId, chunks: Vec<usize>) {
        if chunks.is_empty() {
            return self.unlock_changed(state);
        }
        let streams = state
            .ranges
            .get(&id)
            .map_or_else(Vec::new, |range| range.streams.clone());
        state.recording += 1;
        drop(state);
        let until = Until::now(&self.device, &streams);
        let mut state = self.lock();
        state.recording -= 1;
        state.queue.push(id, chunks, until);
        self.unlock_changed(state);
        self.worker.wake(self, false);
    }

    /// Waits for one thing that can bring memory back: a fence, a context synchronise, or someone else's
    /// work. Says whether there was any.
    fn await_progress<'a>(
        self: &'a Arc<Self>,
        state: MutexGuard<'a, State>,
    ) -> Result<Option<MutexGuard<'a, State>>> {
        let first_fence = state
            .queue
            .conditions()
            .into_iter()
            .find_map(|(_, until)| match until {
                Until::Fences(fences) => Some(fences),
                Until::Synchronised => None,
            });
        if let Some(fences) = first_fence {
            drop(state);
            for fence in fences.iter() {
                match fence.wait() {
                    Err(error) if !error.is_poisoned() => return Err(error),
                    _ => {}
                }
            }
            self.poll();
            return Ok(Some(self.lock()));
        }
        if !state.queue.is_empty() {
            drop(state);
            if CaptureGuard::any() {
                return Ok(None);
            }
            if self.worker.wake(self, true) {
                let state = self.lock();
                // The worker may have been faster than this lock.
                return Ok(Some(if state.queue.is_empty() {
                    state
                } else {
                    self.wait(state)
                }));
            }
            if let Some(_no_capture) = CaptureGuard::try_none() {
                self.synchronise();
            }
            return Ok(Some(self.lock()));
        }
        let stats = state.parts();
        if state.recording > 0 || stats.filling_bytes + stats.retiring_bytes > 0 {
            return Ok(Some(self.wait(state)));
        }
        drop(state);
        Ok(None)
    }

    /// Gives up what can be spared, because the device has run out of memory.
    fn relieve(&self) {
        self.poll();
        self.retry();
        let _ = self.drain_parked(0, None);
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.check_process().is_err() {
            self.worker.abandon();
            return;
        }
        // Pools close their ranges, so memory is left here only if the driver refused it, or if a capture
        // was declared and no worker could wait for its end. Such memory is not unmapped now: the device
        // may still use it. Its own quarantine keeps and retries it.
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        for range in state.ranges.values_mut() {
            for mapping in range.pages.take_all() {
                self.device.quarantine(|quarantine| {
                    quarantine.push(crate::quarantine::Stuck::Mapping(mapping));
                });
            }
        }
    }
}
