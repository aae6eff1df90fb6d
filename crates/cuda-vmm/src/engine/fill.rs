//! Backing pages: create, map, set access, and undo it all if one call fails.

use super::books::chunk_plan::ChunkPlan;
use super::books::ledger::{AccountId, Refusal};
use super::books::pressure::Ticket;
use super::relief::Relief;
use super::{AtWork, Inner, Locked, RangeId, State};
use crate::events::Entered;
use crate::mapping::MapFailure;
use crate::size::Extent;
use crate::sync::{Arc, MutexGuard};
use crate::{Access, Device, Mapping, PhysicalMemory, Reservation, Result, VmmError};
use core::ops::Range;

/// What a failed filling could not undo, and why it failed.
pub(super) struct Failure {
    pub(super) error: VmmError,
    pub(super) still_mapped: Vec<(Range<usize>, Mapping)>,
    unreleased: Vec<PhysicalMemory>,
    /// What came from the cache.
    cached: Vec<PhysicalMemory>,
}

/// A chunk that was made.
pub(super) struct Made {
    pub(super) pages: Range<usize>,
    pub(super) mapping: Mapping,
    /// Whether its memory came from the cache.
    from_cache: bool,
}

impl Locked<'_> {
    /// Charges an account for all that a plan backs, in its turn, and takes from the cache what serves it.
    pub(super) fn charge(
        &mut self,
        account: AccountId,
        plan: &ChunkPlan,
        page_bytes: usize,
        ticket: Option<Ticket>,
    ) -> Result<Vec<PhysicalMemory>, Refusal> {
        let need_bytes = plan.pages() * page_bytes;
        let cannot_help = |cached_bytes: usize| {
            cached_bytes == 0
                || need_bytes
                    > (self.ledger.room(account, ticket).free_bytes).saturating_add(cached_bytes)
        };
        // Then without looking at each chunk.
        if cannot_help(self.cache.bytes()) {
            self.ledger.admit(account, need_bytes, 0, ticket)?;
            self.ledger.charge(account, need_bytes, ticket)?;
            return Ok(Vec::new());
        }
        let chunks = plan.chunks().into_iter();
        let chunks: Vec<_> = chunks.map(|chunk| chunk.len() * page_bytes).collect();
        self.charge_chunks(account, &chunks, ticket)
    }

    /// Charges an account for chunks of these sizes in bytes, and takes from the cache what serves them. A refusal changes
    /// nothing, so that it wakes nobody.
    pub(super) fn charge_chunks(
        &mut self,
        account: AccountId,
        chunks: &[usize],
        ticket: Option<Ticket>,
    ) -> Result<Vec<PhysicalMemory>, Refusal> {
        let need_bytes = chunks.iter().sum();
        let supply_bytes = self.cache.supply_bytes(chunks.iter().copied());
        (self.ledger).admit(account, need_bytes, supply_bytes, ticket)?;
        let state = &mut **self;
        let supply = chunks.iter().filter_map(|bytes| state.cache.take(*bytes));
        let supply = supply.collect();
        state.ledger.take_from_cache(supply_bytes);
        state.ledger.charge(account, need_bytes, ticket)?;
        Ok(supply)
    }
}

impl State {
    /// Takes back the charge for what was not made, but for what is still mapped and what the driver would not release.
    pub(super) fn settle(
        &mut self,
        account: AccountId,
        charged_bytes: usize,
        mapped_bytes: usize,
        failure: &mut Failure,
        supply: Vec<PhysicalMemory>,
    ) {
        let unreleased = failure.unreleased.iter().map(PhysicalMemory::bytes);
        let kept_bytes = mapped_bytes + unreleased.sum::<usize>();
        self.ledger.refund(account, charged_bytes - kept_bytes);
        let unreleased = failure.unreleased.drain(..);
        self.unreleased
            .extend(unreleased.map(|memory| (Some(account), memory)));
        self.restock(supply.into_iter().chain(failure.cached.drain(..)));
    }

    /// Puts back what was taken from the cache.
    fn restock(&mut self, supply: impl IntoIterator<Item = PhysicalMemory>) {
        for memory in supply {
            self.ledger.restock(memory.bytes());
            self.cache.put(memory.bytes(), memory);
        }
    }
}

impl Failure {
    fn new(error: VmmError) -> Self {
        Self {
            error,
            still_mapped: Vec::new(),
            unreleased: Vec::new(),
            cached: Vec::new(),
        }
    }

    /// Undoes what was made, for want of a use.
    fn of(error: VmmError, made: Vec<Made>) -> Self {
        let mut failure = Self::new(error);
        (made.into_iter().rev()).for_each(|made| failure.undo(made));
        failure
    }

    /// Undoes one chunk, or keeps what cannot be undone.
    fn undo(&mut self, made: Made) {
        match made.mapping.unmap() {
            Ok(memory) => self.release(memory, made.from_cache),
            Err(failure) => self.still_mapped.push((made.pages, failure.object)),
        }
    }

    fn release(&mut self, memory: Arc<PhysicalMemory>, from_cache: bool) {
        match Arc::into_inner(memory) {
            Some(memory) if from_cache => self.cached.push(memory),
            Some(memory) => {
                let stuck = memory.close().err();
                self.unreleased.extend(stuck.map(|failure| failure.object));
            }
            None => {}
        }
    }
}

/// What is needed of a range to back its pages, without the lock.
pub(super) struct Target {
    reservation: Arc<Reservation>,
    access: Arc<[(Device, Access)]>,
    page_bytes: usize,
}

impl Target {
    /// `None` if the range has ended.
    pub(super) fn of(range: &super::range::Range) -> Option<Self> {
        Some(Self {
            reservation: range.reservation.clone()?,
            access: range.access.clone(),
            page_bytes: range.page_bytes,
        })
    }
}

impl Inner {
    /// Backs the missing pages of an extent, for which the account is charged already, and makes its bytes
    /// live. On failure the state is what it was, but for what the driver would not take back.
    pub(super) fn fill(
        self: &Arc<Self>,
        mut state: Locked<'_>,
        mut range: MutexGuard<'_, super::range::Range>,
        id: RangeId,
        extent: Extent,
        (plan, mut supply): (ChunkPlan, Vec<PhysicalMemory>),
        relief: &mut Relief,
    ) -> Result<()> {
        let bytes = extent.range();
        let survey = &plan.survey;
        state.queue.follow(id, &survey.retiring);
        if survey.missing.is_empty() {
            range.pages.take(&bytes, survey);
            range.counters.allocations += 1;
            let hungry = range.advance(bytes.end);
            // What was parked is in use again.
            drop((range, state));
            if hungry {
                self.worker.wake(self, false);
            }
            return Ok(());
        }
        let Some(target) = Target::of(&range) else {
            return Err(VmmError::Closed);
        };
        let runs: Vec<_> = plan.runs().collect();
        range.pages.begin(&bytes, survey, &runs);
        let is_late = range.options.ahead_bytes_max > 0;
        range.counters.late_prefetches += u64::from(is_late);
        let work = AtWork::begin();
        drop((range, state));
        let _span = Entered::new(|| {
            tracing::debug_span!("fill", offset = bytes.start, bytes = bytes.len())
        });
        if is_late {
            crate::events::debug!("memory that was to be made ahead is not there yet");
        }
        let mut made = {
            let _caller = self.device.call_for_someone();
            self.back(id, &target, &plan, &mut supply, relief)
        };
        let mut state = self.lock();
        let is_closed = |state: &State| state.ranges.get(id).is_none_or(|range| range.closed);
        if made.is_ok() && is_closed(&state) {
            // Nobody gets these pages. A thread that closed the range from within this work has not waited for it.
            drop(state);
            made = made.and_then(|chunks| Err(Failure::of(VmmError::Closed, chunks)));
            state = self.lock();
        }
        let State { ranges, ledger, .. } = &mut *state;
        // The range cannot have gone: it ends with its last chunk, and some are being filled.
        let Some(mut range) = ranges.get(id) else {
            return Err(VmmError::Closed);
        };
        match made {
            Ok(chunks) => {
                let made_pages: usize = chunks.iter().map(|made| made.pages.len()).sum();
                let chunks = chunks.into_iter().map(|made| (made.pages, made.mapping));
                range.pages.finish(&bytes, &runs, chunks);
                let unmade_bytes = (plan.pages() - made_pages) * target.page_bytes;
                ledger.refund(range.account, unmade_bytes);
                range.counters.allocations += 1;
                let hungry = range.advance(bytes.end);
                drop((work, range));
                drop(state);
                if hungry {
                    self.worker.wake(self, false);
                }
                Ok(())
            }
            Err(mut failure) => {
                let account = range.account;
                let still_mapped = core::mem::take(&mut failure.still_mapped);
                let kept = still_mapped.iter().map(|(_, mapping)| mapping.bytes());
                let kept_bytes = kept.sum();
                let orphans = (range.pages).abort(&bytes, survey, &runs, still_mapped);
                let is_left = range.closed && !range.attended;
                drop(range);
                let charged_bytes = plan.pages() * target.page_bytes;
                state.settle(account, charged_bytes, kept_bytes, &mut failure, supply);
                drop(work);
                self.retire(state, id, orphans);
                if is_left {
                    self.go_on_closing();
                }
                // Something may be stuck, or parked again.
                self.worker.wake(self, false);
                Err(failure.error)
            }
        }
    }

    /// Makes chunks for all missing pages, or none. Spare pages may stay without.
    fn back(
        &self,
        id: RangeId,
        target: &Target,
        plan: &ChunkPlan,
        supply: &mut Vec<PhysicalMemory>,
        relief: &mut Relief,
    ) -> Result<Vec<Made>, Failure> {
        // Chunks still to be made, the next one last.
        let mut left = plan.chunks();
        left.reverse();
        let mut done: Vec<Made> = Vec::with_capacity(left.len());
        while let Some(pages) = left.pop() {
            let mut failure = match self.make(target, &pages, supply, || ()) {
                Ok(made) => {
                    done.push(made);
                    continue;
                }
                Err(failure) => failure,
            };
            let nothing_stuck = failure.still_mapped.is_empty() && failure.unreleased.is_empty();
            if failure.error.is_out_of_memory() && nothing_stuck {
                if relief.is_news() {
                    self.lock().counters.device_shortages += 1;
                    let (error, bytes) = (&failure.error, pages.len() * target.page_bytes);
                    crate::events::warn!(%error, bytes, "the device has no memory though the budget has room");
                }
                // The budget had room but the device has not: engines of the device give up what they can spare, a
                // piece at a time, then others in the process do, and then smaller chunks may still find room.
                if relief.next(self, id, pages.len() * target.page_bytes) {
                    supply.append(&mut failure.cached);
                    left.push(pages);
                    continue;
                }
                // Memory that is there already is not what the device has too little of.
                if failure.cached.is_empty() && plan.may_halve(&pages) {
                    let middle = pages.start + pages.len() / 2;
                    let halves = [middle..pages.end, pages.start..middle];
                    left.extend(halves.into_iter().filter(|half| plan.is_asked_for(half)));
                    continue;
                }
            }
            for made in done.into_iter().rev() {
                failure.undo(made);
            }
            return Err(failure);
        }
        Ok(done)
    }

    /// Makes one chunk, of memory from the supply if some fits. `before` is called before the calls of the driver that
    /// take long.
    pub(super) fn make(
        &self,
        target: &Target,
        pages: &Range<usize>,
        supply: &mut Vec<PhysicalMemory>,
        before: impl Fn(),
    ) -> Result<Made, Failure> {
        let bytes = pages.len() * target.page_bytes;
        let fitting = supply.iter().position(|memory| memory.bytes() == bytes);
        let from_cache = fitting.is_some();
        let memory = match fitting {
            Some(at) => Ok(supply.swap_remove(at)),
            None => {
                before();
                PhysicalMemory::new(&self.device, bytes)
            }
        };
        before();
        let memory = memory.map(Arc::new).map_err(Failure::new)?;
        let offset = pages.start * target.page_bytes;
        match Mapping::try_new(&target.reservation, offset, &memory, &target.access) {
            Ok(mapping) => Ok(Made {
                pages: pages.clone(),
                mapping,
                from_cache,
            }),
            Err(MapFailure { error, stuck }) => {
                let mut failure = Failure::new(error);
                match stuck {
                    Some(mapping) => {
                        drop(memory);
                        failure.still_mapped.push((pages.clone(), mapping));
                    }
                    None => failure.release(memory, from_cache),
                }
                Err(failure)
            }
        }
    }
}
