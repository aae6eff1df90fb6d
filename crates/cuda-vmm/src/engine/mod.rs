//! One budget on one device: who holds which physical memory.
//!
//! `books` is pure bookkeeping. The other modules join it to the driver under three rules: no lock is held over a driver call; what a failed
//! call leaves is what was there before; nothing is unmapped that the device may still use.

mod at_work;
mod books;
mod changes;
mod compact;
mod drain;
mod fill;
mod follow;
mod lease;
mod options;
mod owed;
mod pin;
mod prefetch;
mod range;
mod ranges;
mod refused;
mod relief;
mod retire;
mod snapshot;
mod stats;
mod users;
mod waiting;
mod worker;

pub use books::counters::{EngineCounters, PoolCounters};
pub(crate) use books::ledger::Quota;
pub use compact::CompactReport;
pub use lease::LeaseToken;
pub use options::{EngineOptions, PoolOptions};
pub(crate) use owed::Owed;
pub use pin::GraphPin;
pub(crate) use range::{Place, RangeStats};
pub(crate) use ranges::{Handle, RangeId};
pub(crate) use snapshot::Look;
pub use stats::{EngineStats, StepReport};
pub(crate) use waiting::Patience;
pub use worker::WorkerMode;

use crate::process::Process;
use crate::sync::atomic::{AtomicBool, AtomicUsize};
use crate::sync::{Apart, Arc, Condvar, Mutex, PoisonError, Weak};
use crate::sys::CUDA_ERROR_CAPTURED_EVENT;
use crate::{
    CaptureGuard, Device, MemoryParts, PhysicalMemory, QuotaConflict, Result, Stream, VmmError,
};
use at_work::AtWork;
use books::cache::Cache;
use books::ledger::{AccountId, Ledger};
use changes::Locked;
use compact::Relocations;
use core::time::Duration;
use drain::Drained;
use ranges::Ranges;
use refused::{Refusals, Which};
use retire::{Queue, Until};
use users::Users;
use worker::Worker;

/// One budget on one device, shared by the ranges that are made on it; a cheap clone.
///
/// It lives until its last range is gone and its memory given back.
#[derive(Clone, Debug)]
pub struct Engine(Arc<Inner>, Process);

#[derive(Debug)]
pub(crate) struct Inner {
    device: Device,
    options: EngineOptions,
    /// The limit as it was given, or the device's total.
    limit_bytes: usize,
    state: Mutex<State>,
    changed: Condvar,
    worker: Worker,
    /// Threads that wait for `changed`: asked without the lock by all who free memory, and changed seldom.
    waiting: Apart<AtomicUsize>,
    /// Whether anyone owes memory, or wants more than there is: as `waiting`.
    is_pressing: Apart<AtomicBool>,
}

#[derive(Debug)]
struct State {
    ledger: Ledger,
    /// What has happened, but for what ranges that are there count themselves.
    counters: EngineCounters,
    ranges: Ranges,
    next_pin: u64,
    queue: Queue,
    cache: Cache<PhysicalMemory>,
    /// Where memory is overwritten before it goes to the cache; made when it is first needed.
    scrubbing: Option<Stream>,
    /// Memory that is mapped nowhere but that the driver would not release, and on whose account it is, or that of
    /// the cache.
    unreleased: Vec<(Option<AccountId>, PhysicalMemory)>,
    /// Bytes of it that are being released now, by a thread that has taken them out.
    releasing: Vec<(Option<AccountId>, usize)>,
    /// Chunks that are being moved, and what that has left.
    relocations: Relocations,
    /// When what the driver refused is tried again.
    refusals: Refusals,
    /// Ranges that are gone from `ranges` and whose addresses are being freed now.
    ending: Vec<RangeId>,
    /// The engine itself, while closed ranges are left of which memory was leased: nobody else may be. Without a worker, a
    /// step finds the leases over, or another engine of the device that is short of memory.
    kept: Option<Arc<Inner>>,
}

impl State {
    /// What is parked and may be unmapped, in bytes.
    fn spare_parked_bytes(&self) -> usize {
        let ranges = self.ranges.values();
        ranges.map(|range| range.spare_parked_bytes()).sum()
    }

    /// Puts chunks that were freed under their range's lock into the queue; says whether there were any.
    fn collect_freed(&mut self) -> bool {
        let mut any = false;
        for handle in self.ranges.with_news() {
            let mut range = handle.lock();
            any |= !range.freed.is_empty();
            self.queue.collect(handle.id(), &mut range);
            handle.note(&range);
        }
        any
    }

    /// What is committed, by what it is.
    fn parts(&self) -> MemoryParts {
        self.stats_seen(|_, _| ()).parts
    }

    /// The numbers, and a look at each range in the same moment: a range's memory may change from one part to another
    /// under the range's lock alone.
    fn stats_seen(&self, mut see: impl FnMut(RangeId, &range::Range)) -> EngineStats {
        let unreleased = self.unreleased.iter().map(|(_, memory)| memory.bytes());
        let mut parts = MemoryParts {
            filling_bytes: self.relocations.moving_bytes(None),
            retiring_bytes: self.releasing.iter().map(|(_, bytes)| bytes).sum(),
            cached_bytes: self.cache.bytes(),
            quarantined_bytes: unreleased.sum::<usize>() + self.relocations.quarantined_bytes(None),
            ..MemoryParts::default()
        };
        let mut chunks = 0;
        for (id, range) in self.ranges.iter() {
            see(id, &range);
            parts += range.parts();
            chunks += range.pages.chunks();
        }
        EngineStats {
            limit_bytes: 0,
            committed_bytes: self.ledger.committed_bytes(),
            parts,
            ranges: self.ranges.len(),
            chunks,
        }
    }
}

/// Takes one such entry out of a list.
fn take_out<A: Copy + PartialEq>(list: &mut Vec<(A, usize)>, account: A, bytes: usize) {
    let at = list.iter().position(|held| *held == (account, bytes));
    at.map(|at| list.swap_remove(at));
}

impl Engine {
    /// An engine on this device.
    ///
    /// # Errors
    /// [`VmmError::ZeroSize`] for a limit of 0; [`VmmError::QuotaUnsatisfiable`] if the headroom leaves
    /// nothing, or if `park_bytes_min` is above `park_bytes_max`.
    pub fn new(device: &Device, options: EngineOptions) -> Result<Self> {
        options.check()?;
        let limit_bytes = options.limit_bytes.unwrap_or(device.total_bytes());
        if limit_bytes == 0 {
            return Err(VmmError::ZeroSize { what: "limit" });
        }
        let mut budget_bytes = limit_bytes;
        if options.headroom_bytes > 0 {
            let available_bytes = device.total_bytes();
            if options.headroom_bytes >= available_bytes {
                return Err(VmmError::QuotaUnsatisfiable {
                    what: QuotaConflict::Headroom,
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
                counters: EngineCounters::default(),
                ranges: Ranges::default(),
                next_pin: 0,
                queue: Queue::default(),
                cache: Cache::default(),
                scrubbing: None,
                unreleased: Vec::new(),
                releasing: Vec::new(),
                relocations: Relocations::default(),
                refusals: Refusals::default(),
                ending: Vec::new(),
                kept: None,
            }),
            changed: Condvar::new(),
            worker: Worker::new(options.worker),
            waiting: Apart::default(),
            is_pressing: Apart::default(),
        });
        let holder: Weak<Inner> = Arc::downgrade(&inner);
        device.register(holder)?;
        Ok(Self(inner, device.driver().process()))
    }

    /// For this module, whose public functions ask for the process themselves.
    fn inner(&self) -> &Arc<Inner> {
        &self.0
    }

    /// The door for pools: fails in a forked process, where the locks behind it may be held for good.
    pub(crate) fn open(&self) -> Result<&Arc<Inner>> {
        self.1.check().map(|()| &self.0)
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// The limit in bytes, as it was given.
    pub fn limit_bytes(&self) -> usize {
        self.0.limit_bytes
    }

    /// What it holds now; one moment's snapshot. All zero but the limit in a forked process.
    pub fn stats(&self) -> EngineStats {
        // In a forked process the lock may be held for good.
        let mut stats = match self.1.check() {
            Ok(()) => self.0.lock().stats_seen(|_, _| ()),
            Err(_) => EngineStats::default(),
        };
        stats.limit_bytes = self.0.limit_bytes;
        stats
    }

    /// What has happened so far; one moment's numbers. All zero in a forked process but for what the device counts.
    pub fn counters(&self) -> EngineCounters {
        let mut counters = match self.1.check() {
            Ok(()) => self.0.lock().look().counters,
            Err(_) => EngineCounters::default(),
        };
        counters.device_calls = self.0.device.memory_calls();
        counters
    }

    /// Does the work that is due: looks which freed memory the device has finished with, synchronises the
    /// context where no stream was named (unless a capture is declared), gives back what is above
    /// `park_bytes_max`, makes memory ahead for the ranges that ask for it, and retries what the driver refused.
    ///
    /// With [`WorkerMode::Thread`] the engine's thread calls it. Waits for the device only where a context
    /// synchronise is due.
    ///
    /// In a forked process it does nothing.
    pub fn step(&self) -> StepReport {
        match self.1.check() {
            Ok(()) => self.0.step(false),
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
        self.trim_to(0)
    }

    /// As [`trim`](Self::trim), but only until no more than `bytes` bytes are committed.
    ///
    /// # Errors
    /// As [`trim`](Self::trim).
    pub fn trim_to(&self, bytes: usize) -> Result<usize> {
        self.1.check()?;
        self.0.poll();
        let retried_bytes = self.0.retry(&Which::All);
        let (given_bytes, outcome) = self.0.give_up(None, |parts| parts.total_bytes() <= bytes);
        outcome.map(|()| retried_bytes + given_bytes)
    }
}

impl Inner {
    /// Fails in a forked process, where other threads' locks may be held for good and nothing that is
    /// waited for comes.
    fn check_process(&self) -> Result<()> {
        self.device.driver().check_process()
    }

    /// In how long a step would find something to do: at once, or when refused memory is to be tried again; `None` if
    /// nothing is to be done.
    fn next_work(&self) -> Option<Duration> {
        let state = self.lock();
        let has_work = !state.queue.is_empty()
            || state.ranges.with_news().next().is_some()
            || state.spare_parked_bytes() > self.options.park_bytes_max
            || state.spare_above_ceiling().is_some()
            || (state.ranges.values())
                .any(|range| range.is_ending() || range.is_hungry || range.stale_ahead().is_some());
        match has_work {
            true => Some(Duration::ZERO),
            // In a context beyond use it is left alone.
            false => state.retry_in().filter(|_| !self.device.is_lost()),
        }
    }

    fn step(self: &Arc<Self>, is_worker: bool) -> StepReport {
        let mut retired_bytes = self.poll();
        // What cannot be synchronised now is tried again at the next step.
        let synchronised = self.synchronise(None).unwrap_or_default();
        retired_bytes += synchronised.unwrap_or_default();
        // A step that somebody calls is a try; the worker's are many.
        let due = if is_worker { Which::Due } else { Which::All };
        let retried_bytes = self.retry(&due);
        let drained_bytes = self.give_back();
        let prefetched_bytes = self.prefetch(is_worker);
        self.finish_closing();
        let stats = self.lock().parts();
        let report = StepReport {
            retired_bytes,
            drained_bytes: retried_bytes + drained_bytes,
            prefetched_bytes,
            retiring_bytes: stats.retiring_bytes,
            quarantined_bytes: stats.quarantined_bytes,
        };
        crate::events::trace!(?report, is_worker, "took a step");
        report
    }

    /// Looks which leases are over, and parks the chunks that the device has finished with, as far as fences tell; returns
    /// their bytes.
    /// Never waits.
    fn poll(self: &Arc<Self>) -> usize {
        self.look_at_news();
        let (mut past, mut useless) = (Vec::new(), Vec::new());
        let conditions = self.lock().queue.conditions();
        for (id, until) in conditions {
            match until.is_past() {
                Ok(true) => past.push(id),
                Ok(false) => {}
                // A capture began between the question whether there is one and the record.
                Err(error) if error.driver_code() == Some(CUDA_ERROR_CAPTURED_EVENT) => {
                    useless.push(id)
                }
                // A fence that cannot be asked now is asked again at the next step.
                Err(_) => {}
            }
        }
        if !useless.is_empty() {
            let fences = self.lock().queue.give_up_fences(&useless);
            drop(fences);
        }
        self.park(&past)
    }

    /// Waits for all work of the context, then parks what waited for that, of one range or of all; returns the bytes. `None` if
    /// nothing waits for it, or if a capture is declared.
    fn synchronise(&self, only: Option<RangeId>) -> Result<Option<usize>> {
        let (waiting, all) = {
            let state = self.lock();
            let all = state.ranges.values().any(|range| range.users.are_all());
            (state.queue.unsynchronised(only), all)
        };
        if waiting.is_empty() {
            return Ok(None);
        }
        let Some(no_capture) = CaptureGuard::try_none() else {
            return Ok(None);
        };
        let synchronised = self.device.finish_work(all);
        // Before anyone is told: that may run code of others, which may begin a capture.
        drop(no_capture);
        match synchronised {
            Err(error) if !error.is_poisoned() => Err(error),
            // Done; or poisoned, and then nothing runs any more.
            _ => Ok(Some(self.park(&waiting))),
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
            if let Some(mut range) = state.ranges.get(entry.range) {
                for first in &entry.chunks {
                    bytes += range.pages.chunk_bytes(*first);
                    range.pages.park(*first);
                }
            }
        }
        drop(state);
        if bytes > 0 {
            // An allocation for which the device has no memory can take it.
            self.device.note_memory();
        }
        // The fences go here, without the lock: dropping them calls the driver.
        drop(entries);
        bytes
    }

    /// Records when the freed chunks of a range will be free of the device, and has it looked at.
    fn retire(self: &Arc<Self>, state: Locked<'_>, id: RangeId, chunks: Vec<usize>) {
        let freed = state.ranges.handle(id).filter(|_| !chunks.is_empty());
        let freed = freed.cloned();
        // Before others are told: that runs their code.
        let _work = AtWork::begin();
        drop(state);
        if let Some(handle) = freed {
            let users = handle.lock().users.clone();
            self.record(&handle, users, chunks);
        }
    }

    /// As [`retire`](Self::retire), without the engine's lock: the range keeps what was freed until somebody looks at the
    /// queue.
    fn record(self: &Arc<Self>, handle: &Handle, users: Users, chunks: Vec<usize>) {
        // In this thread's hands until the range has them: the driver is called, and owners of streams may be dropped.
        let work = AtWork::begin();
        let users = self.users(handle, users);
        let until = Until::now(&self.device, &users);
        let mut range = handle.lock();
        range.freed.push((chunks, until));
        handle.note(&range);
        drop((work, range));
        self.tell();
        self.worker.wake(self, false);
    }

    /// Waits for one thing that can bring memory back, to one range or to any: a fence, a context synchronise,
    /// or another thread's work. Says whether there was any, or why it cannot be waited for.
    fn await_progress<'a>(
        self: &'a Arc<Self>,
        mut state: Locked<'a>,
        only: Option<RangeId>,
    ) -> Result<Option<Locked<'a>>> {
        state.quietly().collect_freed();
        if let Some((id, fences)) = state.queue.first_fences(only) {
            state.quietly().counters.waits += 1;
            drop(state);
            crate::events::debug!("waits for the device");
            let waited = fences
                .iter()
                .map(|fence| fence.wait())
                .find(|waited| match waited {
                    Err(error) => !error.is_poisoned(),
                    Ok(()) => false,
                });
            match waited {
                // Not asked again: a driver that would not answer would have this wait for ever.
                None | Some(Ok(())) => {
                    self.park(&[id]);
                    self.poll();
                }
                Some(Err(error)) if error.driver_code() == Some(CUDA_ERROR_CAPTURED_EVENT) => {
                    let useless = self.lock().queue.give_up_fences(&[id]);
                    drop(useless);
                }
                Some(Err(error)) => return Err(error),
            }
            // Before the lock is taken: it may be the last to hold them, and dropping a fence calls the driver.
            drop(fences);
            return Ok(Some(self.lock()));
        }
        if !state.queue.unsynchronised(only).is_empty() {
            state.quietly().counters.waits += 1;
            drop(state);
            // `None` also if another thread was faster: then the caller looks again.
            let synchronised = self.synchronise(only)?.is_some();
            let may_go_on = synchronised || !CaptureGuard::any();
            return Ok(may_go_on.then(|| self.lock()));
        }
        let stats = state.parts();
        // What is freed now and has no fence yet is retiring too.
        if stats.filling_bytes + stats.retiring_bytes > 0 && !AtWork::any() {
            return Ok(Some(self.wait(state)));
        }
        Ok(None)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.check_process().is_err() {
            self.worker.abandon();
            return;
        }
        // Pools close their ranges, so memory is left here only if the driver refused it, or if a capture
        // was declared and no worker could wait for its end. The device may still use it, so it is not
        // unmapped now; the device's quarantine keeps it until that is known.
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.relocations.abandon(&self.device);
        for mut range in state.ranges.values() {
            let (in_use, finished) = range.pages.take_all();
            self.device.keep_unfinished(in_use);
            for mapping in finished {
                self.device.keep(mapping, None);
            }
        }
    }
}
