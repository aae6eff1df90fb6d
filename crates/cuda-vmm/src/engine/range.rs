//! One elastic range of an engine: its addresses, and taking and giving back bytes of it.

use super::books::chunk_plan::{ChunkPlan, ChunkRules};
use super::books::ledger::{AccountId, Quota, Refusal};
use super::books::pages::{ChunkState, Pages, Survey};
use super::books::pressure::Ticket;
use super::lease::{Asker, Leases};
use super::refused::Which;
use super::relief::Relief;
use super::retire::Until;
use super::users::Users;
use super::waiting;
use super::{AtWork, Handle, Inner, Owed, Patience, PoolCounters, PoolOptions, RangeId, State};
use crate::size::{Extent, check_page_bytes};
use crate::sync::Arc;
use crate::sync::atomic::Ordering;
use crate::{Access, Device, Mapping, MemoryParts, Reservation, Result, Stream, VmmError};
use std::collections::BTreeMap;

#[derive(Debug)]
pub(crate) struct Range {
    /// Its addresses; none when the range has ended.
    pub(super) reservation: Option<Arc<Reservation>>,
    pub(super) access: Arc<[(Device, Access)]>,
    pub(super) pages: Pages<Mapping>,
    pub(super) account: AccountId,
    pub(super) users: Users,
    /// Chunks that were freed and are not in the engine's queue yet, and until when they retire.
    pub(super) freed: Vec<(Vec<usize>, Until)>,
    pub(super) options: PoolOptions,
    /// Where the latest allocation ended, in bytes.
    pub(super) frontier_bytes: usize,
    /// Whether memory is to be made ahead of it.
    pub(super) is_hungry: bool,
    /// Pages that graphs name, by number.
    pub(super) pins: BTreeMap<u64, core::ops::Range<usize>>,
    /// What is used outside, whether the owner frees it or not.
    pub(super) leases: Leases,
    pub(super) counters: PoolCounters,
    pub(super) owed: Arc<Owed>,
    pub(super) capacity_bytes: usize,
    pub(super) page_bytes: usize,
    pub(super) closed: bool,
    /// Whether the thread that closed it is giving back what it has. Steps leave that alone, but for what the driver refused
    /// before: two threads that call the driver in turns are slower than one.
    pub(super) attended: bool,
    /// Allocations for which others are making room on the device now.
    pub(super) making_room: usize,
}

/// Says that a range is not attended any more when it is dropped, which takes the engine's lock.
struct Attendance<'a> {
    engine: &'a Inner,
    /// The range, from when it is attended.
    id: Option<RangeId>,
}

impl Drop for Attendance<'_> {
    fn drop(&mut self) {
        let Some(id) = self.id else {
            return;
        };
        if let Some(mut range) = self.engine.lock().ranges.get(id) {
            range.attended = false;
        }
    }
}

/// Where bytes are wanted.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place {
    /// At this offset.
    At(usize),
    /// At the lowest unused offset that is a multiple of this.
    FirstFit { alignment: usize },
}

/// Numbers of one range, taken in one moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RangeStats {
    pub(crate) parts: MemoryParts,
    pub(crate) live_bytes: usize,
    pub(crate) live_pages: usize,
    pub(crate) committed_bytes: usize,
    pub(crate) chunks: usize,
    pub(crate) unused_bytes: usize,
    pub(crate) largest_unused_run_bytes: usize,
    pub(crate) quota: Quota,
    pub(crate) counters: PoolCounters,
}

/// A part that begins within one that begins before it, or with it. None is empty, and none too long.
fn overlapping(parts: &[(usize, usize)]) -> Option<(usize, usize)> {
    if parts.len() < 2 {
        return None;
    }
    let mut sorted = parts.to_vec();
    sorted.sort_unstable();
    let pairs = sorted.windows(2);
    let is_within = |pair: &&[(usize, usize)]| pair[1].0 < pair[0].0 + pair[0].1;
    pairs.filter(is_within).map(|pair| pair[1]).next()
}

impl Range {
    /// What this range and its engine say about chunks.
    fn chunk_rules(&self, chunk_bytes_max: usize) -> ChunkRules {
        ChunkRules {
            capacity_bytes: self.capacity_bytes,
            page_bytes: self.page_bytes,
            chunk_bytes_max,
            single_handle: self.options.single_handle,
        }
    }

    /// Checks bytes that must all be live.
    pub(super) fn live_extent(&self, offset: usize, bytes: usize) -> Result<Extent> {
        let extent = Extent::new(offset, bytes, self.capacity_bytes)?;
        if !self.is_live(&extent.range()) {
            return Err(VmmError::NotMapped { offset, bytes });
        }
        Ok(extent)
    }

    /// Makes bytes live if all their pages are there and nobody works on them; `None` if that takes more. The errors are
    /// those that [`Inner::allocate`] would have.
    fn take(&mut self, place: Place, bytes: usize) -> Result<Option<usize>> {
        if self.closed {
            return Err(VmmError::Closed);
        }
        let offset = self.place(place, bytes)?;
        let extent = Extent::new(offset, bytes, self.capacity_bytes)?.range();
        if self.pages.take_within_chunk(&extent) {
            self.counters.allocations += 1;
            return Ok(Some(offset));
        }
        if !self.pages.is_beyond_chunk(&extent) {
            return Ok(None);
        }
        let survey = self.pages.survey(&extent);
        let Some(survey) = survey.filter(Survey::is_there) else {
            return Ok(None);
        };
        self.pages.take(&extent, &survey);
        self.counters.allocations += 1;
        Ok(Some(offset))
    }

    /// The offset that a place stands for.
    fn place(&self, place: Place, bytes: usize) -> Result<usize> {
        let alignment = match place {
            Place::At(offset) => return Ok(offset),
            Place::FirstFit { .. } if bytes == 0 => {
                return Err(VmmError::ZeroSize { what: "size" });
            }
            Place::FirstFit { alignment } => alignment,
        };
        let placed = self.pages.place(bytes, alignment, self.capacity_bytes);
        placed.map_err(|largest_free_bytes| VmmError::OutOfVirtualMemory {
            asked_bytes: bytes,
            largest_free_bytes,
        })
    }

    /// Whether a step has something to look after: what was freed is to be queued, or waits for leases to end.
    pub(super) fn has_news(&self) -> bool {
        !self.freed.is_empty() || self.waits_for_leases()
    }

    /// Whether whoever closes it waits for work on it: not for this thread's own, nor for pages that wait for others to make
    /// room, who may be waiting for it to close.
    fn is_awaited_by_close(&self) -> bool {
        self.pages.is_worked_on() && self.making_room == 0 && !AtWork::any()
    }

    /// Ends it. What it is left with is to be dropped without a lock.
    pub(super) fn end(&mut self) -> Remains {
        Remains {
            counters: self.counters,
            _pages: core::mem::replace(&mut self.pages, Pages::new(self.page_bytes)),
            _users: core::mem::take(&mut self.users),
            _freed: core::mem::take(&mut self.freed),
            _leases: core::mem::take(&mut self.leases),
            _reservation: self.reservation.take(),
        }
    }
}

/// What a range that has ended leaves; its addresses go last.
#[derive(Debug)]
pub(super) struct Remains {
    counters: PoolCounters,
    _pages: Pages<Mapping>,
    _users: Users,
    _freed: Vec<(Vec<usize>, Until)>,
    _leases: Leases,
    _reservation: Option<Arc<Reservation>>,
}

impl State {
    /// The error of an allocation for which the budget has no room.
    fn out_of_memory(&self, asked_bytes: usize, room: &Refusal) -> VmmError {
        let stats = self.parts();
        VmmError::OutOfPhysicalMemory {
            asked_bytes,
            free_bytes: room.free_bytes,
            retiring_bytes: stats.retiring_bytes,
            reclaimable_bytes: stats.reclaimable_bytes(),
            limit_bytes: room.limit_bytes,
        }
    }
}

impl Inner {
    /// Reserves addresses for a new range with an account of its own.
    pub(crate) fn open_range(
        self: &Arc<Self>,
        capacity_bytes: usize,
        page_bytes: usize,
        options: PoolOptions,
        quota: Quota,
    ) -> Result<(Handle, u64)> {
        self.check_process()?;
        check_page_bytes(page_bytes, self.device.granularity_bytes())?;
        if capacity_bytes == 0 {
            return Err(VmmError::ZeroSize { what: "capacity" });
        }
        options.check()?;
        let bytes =
            capacity_bytes
                .checked_next_multiple_of(page_bytes)
                .ok_or(VmmError::Overflow {
                    offset: 0,
                    bytes: capacity_bytes,
                })?;
        let account = self.make_room_for(|ledger| ledger.open(quota))?;
        // What was guaranteed to it may serve a thread that waits, which is told as the lock is let go.
        let reservation = Reservation::with_alignment(&self.device, bytes, page_bytes)
            .inspect_err(|_| self.lock().ledger.close(account))?;
        let address = reservation.address();
        let range = Range {
            reservation: Some(Arc::new(reservation)),
            access: [(self.device.clone(), Access::ReadWrite)].into(),
            pages: Pages::new(page_bytes),
            account,
            users: Users::default(),
            freed: Vec::new(),
            options,
            frontier_bytes: 0,
            is_hungry: options.ahead_bytes_max > 0,
            pins: BTreeMap::new(),
            leases: Leases::default(),
            counters: PoolCounters::default(),
            owed: Arc::default(),
            capacity_bytes,
            page_bytes,
            closed: false,
            attended: false,
            making_room: 0,
        };
        let process = self.device.driver().process();
        let handle = self.lock().ranges.insert(range, process);
        if options.ahead_bytes_max > 0 {
            self.worker.wake(self, false);
        }
        Ok((handle, address))
    }

    /// Looks at a range that is open.
    pub(super) fn with_range<T>(
        &self,
        handle: &Handle,
        look: impl FnOnce(&mut Range) -> T,
    ) -> Result<T> {
        handle.check_process()?;
        let mut range = handle.lock();
        match range.closed {
            false => Ok(look(&mut range)),
            true => Err(VmmError::Closed),
        }
    }

    /// Names a stream whose work uses the range.
    pub(crate) fn use_stream(&self, id: RangeId, stream: &Stream) -> Result<()> {
        self.device.expect_same(stream.device())?;
        self.check_process()?;
        self.add_stream(id, stream)
    }

    pub(crate) fn is_live(&self, handle: &Handle, offset: usize, bytes: usize) -> bool {
        self.with_range(handle, |range| {
            Extent::new(offset, bytes, range.capacity_bytes)
                .is_ok_and(|extent| range.is_live(&extent.range()))
        })
        .unwrap_or(false)
    }

    pub(crate) fn live_pages(&self, handle: &Handle) -> usize {
        self.with_range(handle, |range| range.owned_pages())
            .unwrap_or_default()
    }

    pub(crate) fn range_stats(&self, id: RangeId) -> Result<RangeStats> {
        self.check_process()?;
        let state = self.lock();
        let range = state.ranges.get(id).ok_or(VmmError::Closed)?;
        Ok(state.range_stats(&range))
    }

    /// Makes bytes live, backing the pages that are not; returns their offset.
    ///
    /// Waits as `patience` says. Who waits for more than the budget has stands in a line until it is served.
    pub(crate) fn allocate(
        self: &Arc<Self>,
        handle: &Handle,
        place: Place,
        bytes: usize,
        patience: &Patience,
    ) -> Result<usize> {
        handle.check_process()?;
        let mut range = handle.lock();
        // Who is short of memory has set this before it looked at the range. Then what is parked counts as coming back, and
        // to take it changes what is owed.
        if !self.is_pressing.load(Ordering::SeqCst)
            && let Some(offset) = range.take(place, bytes)?
        {
            let hungry = range.advance(offset + bytes);
            drop(range);
            if hungry {
                self.worker.wake(self, false);
            }
            return Ok(offset);
        }
        drop(range);
        let mut ticket = None;
        let outcome = self.allocate_in_turn(handle, place, bytes, patience, &mut ticket);
        if let Some(ticket) = ticket {
            self.leave_line(ticket);
        }
        outcome
    }

    /// As [`allocate`](Self::allocate), with the engine's lock, for what takes more than the range has.
    fn allocate_in_turn(
        self: &Arc<Self>,
        handle: &Handle,
        place: Place,
        bytes: usize,
        patience: &Patience,
        ticket: &mut Option<Ticket>,
    ) -> Result<usize> {
        let id = handle.id();
        // A call from within this thread's own work would wait for that.
        let patience = match AtWork::any() {
            true => &Patience::None,
            false => patience,
        };
        let wait = patience.waits();
        let mut retried = false;
        let mut asked_again = false;
        let mut polled = false;
        let mut followed = false;
        // Why the driver would not take back what was given up for this.
        let mut refused = None;
        let mut relief = Relief::default();
        let mut backoff = waiting::device_backoff();
        let mut state = self.lock();
        loop {
            let mut range = handle.lock();
            if !range.freed.is_empty() {
                state.quietly().queue.collect(id, &mut range);
                handle.note(&range);
            }
            if range.closed {
                return Err(VmmError::Closed);
            }
            let offset = range.place(place, bytes)?;
            let extent = Extent::new(offset, bytes, range.capacity_bytes)?;
            let Some(survey) = range.pages.survey(&extent.range()) else {
                if !range.is_held_by_lease(&extent.range()) {
                    return Err(VmmError::AlreadyMapped { offset, bytes });
                }
                if polled {
                    return Err(VmmError::Leased { offset, bytes });
                }
                polled = true;
                drop((range, state));
                self.ask_tokens(handle, Asker::Waiting);
                self.poll();
                state = self.lock();
                continue;
            };
            let mut plan = ChunkPlan::new(
                &range.pages,
                &extent,
                survey,
                &range.chunk_rules(self.options.chunk_bytes_max),
            );
            let survey = &plan.survey;
            let missing_bytes = survey.missing_pages() * range.page_bytes;
            let unused = survey.unused().map(|first| range.pages.chunk_bytes(first));
            let more_bytes = missing_bytes + unused.sum::<usize>();
            let whole_bytes = extent.pages(range.page_bytes).len() * range.page_bytes;
            if more_bytes > 0 && whole_bytes > state.ledger.account_limit_bytes(range.account) {
                let room = state.ledger.room(range.account, *ticket);
                drop(range);
                // Though a part of it may be there, it never is all at once.
                return Err(state.out_of_memory(whole_bytes, &room));
            }
            // Above a lowered ceiling it may not use what it has freed again, though that is there.
            let above_ceiling = state.room_below_ceiling(&range);
            let above_ceiling = above_ceiling.filter(|room| more_bytes > room.free_bytes);
            let need_bytes = match above_ceiling {
                Some(_) => more_bytes,
                None => missing_bytes,
            };
            if survey.quarantined {
                if retried {
                    return Err(VmmError::Quarantined { offset, bytes });
                }
                retried = true;
                let page_bytes = range.page_bytes;
                drop((range, state));
                self.retry(&Which::At(id, extent.pages(page_bytes)));
                state = self.lock();
                continue;
            }
            let (account, page_bytes) = (range.account, range.page_bytes);
            let busy = survey.busy;
            let retiring =
                !survey.retiring.is_empty() && !state.may_follow(id, &range, &survey.retiring);
            // Where nobody takes steps, or not often, what is past is looked for now and then.
            let overgrown = !survey.retiring.is_empty() && state.queue.is_overgrown();
            let refusal = if busy {
                None
            } else if above_ceiling.is_some() {
                above_ceiling
            } else if retiring || (overgrown && !polled) {
                None
            } else {
                // What would only be there for later is left out before anything is given up for it.
                let charged =
                    state
                        .charge(account, &plan, page_bytes, *ticket)
                        .or_else(|refusal| {
                            if plan.spare_pages == 0 {
                                return Err(refusal);
                            }
                            plan.spare_pages = 0;
                            state.charge(account, &plan, page_bytes, *ticket)
                        });
                match charged {
                    Ok(supply) => {
                        // The charge took it out of the line.
                        *ticket = None;
                        let seen = self.device.memory_events();
                        let filled =
                            self.fill(state, range, id, extent, (plan, supply), &mut relief);
                        match filled {
                            Err(error) if error.is_out_of_memory() => {
                                self.await_device(error, patience, seen, &mut backoff)?;
                                relief.begin_again();
                                (polled, retried, followed) = (false, false, false);
                                state = self.lock();
                                continue;
                            }
                            outcome => return outcome.map(|()| offset),
                        }
                    }
                    Err(refusal) => Some(refusal),
                }
            };
            drop(range);
            // Something is in the way. Cheapest first: what the device has finished with meanwhile, what
            // is parked, and then, if the caller will wait, what comes back by itself.
            let may_help = |refusal: &Refusal| need_bytes <= refusal.beside_guarantees_bytes;
            if !polled && refusal.as_ref().is_none_or(may_help) {
                polled = true;
                drop(state);
                self.poll();
                state = self.lock();
                state.quietly().queue.was_looked_through();
                continue;
            }
            if retiring && !busy && !followed && refusal.is_none() {
                followed = true;
                state = self.make_follow(state, id, &plan.survey.retiring);
                continue;
            }
            if busy && wait {
                // Someone is making or unmapping these very pages, and says when it is done.
                match self.wait_patiently(state, patience) {
                    Some(again) => state = again,
                    None => return Err(self.in_the_way(&self.lock(), id, extent)),
                }
                continue;
            }
            let Some(refusal) = refusal else {
                let error = self.in_the_way(&state, id, extent);
                if !wait {
                    return Err(error);
                }
                match self.await_patiently(state, Some(id), patience)? {
                    Some(again) => state = again,
                    None => return Err(error),
                }
                continue;
            };
            let error = state.out_of_memory(need_bytes, &refusal);
            if need_bytes > refusal.beside_guarantees_bytes {
                // Only a guarantee that goes helps. Nobody owes memory for that, and nobody behind has to wait.
                if let Some(ticket) = ticket.take() {
                    state.ledger.leave_line(ticket);
                }
                match patience {
                    Patience::None | Patience::Retiring => return Err(error),
                    Patience::Until(_) => match self.wait_patiently(state, patience) {
                        Some(again) => state = again,
                        None => return Err(error),
                    },
                }
                continue;
            }
            let stats = state.parts();
            // At its own ceiling a range is helped by its own memory only.
            let only = (need_bytes > refusal.below_ceiling_bytes).then_some(id);
            let (spare_bytes, retiring_bytes) = match only {
                Some(_) => {
                    let range = handle.lock();
                    let own = range.pages.parts();
                    (
                        range.spare_parked_bytes() + own.ahead_bytes,
                        own.retiring_bytes,
                    )
                }
                None => {
                    let spare_bytes = stats.ahead_bytes + stats.cached_bytes;
                    (
                        state.spare_parked_bytes() + spare_bytes,
                        stats.retiring_bytes,
                    )
                }
            };
            if spare_bytes > 0 {
                if let Some(Err(error)) = self.give_up_one(state, only) {
                    refused = Some(error);
                }
                state = self.lock();
                continue;
            }
            if stats.quarantined_bytes > 0 && !asked_again {
                // The driver may take it by now, and the worker's next try may be far off.
                asked_again = true;
                drop(state);
                self.retry(&Which::Wanted);
                state = self.lock();
                continue;
            }
            let in_vain = match patience {
                Patience::None => true,
                // What retires is not what it uses too much of.
                Patience::Retiring if above_ceiling.is_some() => true,
                Patience::Retiring => {
                    retiring_bytes.saturating_add(refusal.free_bytes) < need_bytes
                }
                Patience::Until(_) => false,
            };
            if in_vain {
                let error = refused.unwrap_or(error);
                return Err(match only {
                    Some(_) => error,
                    None => self.refuse(state, ticket, account, need_bytes, error),
                });
            }
            if only.is_none() && state.ledger.awaited_bytes(*ticket) != Some(need_bytes) {
                self.stand_in_line(state, ticket, account, need_bytes);
                state = self.lock();
                continue;
            }
            match self.await_patiently(state, only, patience)? {
                Some(again) => state = again,
                None if only.is_some() => return Err(error),
                None => return Err(self.refuse(self.lock(), ticket, account, need_bytes, error)),
            }
        }
    }

    /// Notes that an allocation answered an error.
    #[cold]
    pub(crate) fn refused(&self, handle: &Handle, place: Place, bytes: usize, error: &VmmError) {
        if !error.is_out_of_memory() {
            return;
        }
        handle.lock().counters.refusals += 1;
        let is_later = error.is_later();
        crate::events::debug!(?place, bytes, %error, is_later, "memory was refused");
    }

    /// Some of the pages asked for are retiring or being worked on, and cannot be had now.
    fn in_the_way(&self, state: &State, id: RangeId, extent: Extent) -> VmmError {
        let stats = state.parts();
        let (asked_bytes, limit_bytes) = state.ranges.get(id).map_or((extent.bytes, 0), |range| {
            let pages = extent.pages(range.page_bytes).len();
            let limit_bytes = state.ledger.account_limit_bytes(range.account);
            (pages * range.page_bytes, limit_bytes)
        });
        VmmError::OutOfPhysicalMemory {
            asked_bytes,
            free_bytes: 0,
            retiring_bytes: stats.retiring_bytes,
            reclaimable_bytes: stats.reclaimable_bytes(),
            limit_bytes,
        }
    }

    /// Ends the life of bytes: of each part, given by offset and size, or after an error of none. Never waits for the
    /// device: pages without live bytes retire, all behind the same fences.
    pub(crate) fn deallocate(
        self: &Arc<Self>,
        handle: &Handle,
        parts: &[(usize, usize)],
    ) -> Result<()> {
        handle.check_process()?;
        let mut range = handle.lock();
        if !range.leases.is_empty() {
            drop(range);
            self.ask_tokens(handle, Asker::Passing);
            range = handle.lock();
        }
        if range.closed {
            return Err(VmmError::Closed);
        }
        for (offset, bytes) in parts.iter().copied() {
            let extent = range.live_extent(offset, bytes)?;
            if range.pages.is_stranded(&extent.range()) {
                return Err(VmmError::Quarantined { offset, bytes });
            }
        }
        if let Some((offset, bytes)) = overlapping(parts) {
            // What is freed with another part is not live any more.
            return Err(VmmError::NotMapped { offset, bytes });
        }
        range.counters.deallocations += 1;
        let mut unused = Vec::new();
        for (offset, bytes) in parts.iter().copied() {
            range.free(&(offset..offset + bytes), &mut unused);
        }
        if parts.len() > 1 {
            unused.sort_unstable();
        }
        let waits = range.waits_for_leases();
        if waits {
            handle.note(&range);
        }
        let users = (!unused.is_empty()).then(|| range.users.clone());
        drop(range);
        if let Some(users) = users {
            self.record(handle, users, unused);
        }
        if waits {
            self.worker.wake(self, false);
        }
        Ok(())
    }

    /// Ends a range: its bytes die, its memory goes back when the device has finished with it, its
    /// addresses after that. Waits for the device and for other threads' work on the range, but not for the end of a declared
    /// capture, nor for threads where that could be this thread's own work, or waits for this one: then, and if the driver
    /// refuses, the engine keeps the range and finishes later.
    pub(crate) fn close_range(self: &Arc<Self>, id: RangeId) -> Result<()> {
        self.check_process()?;
        // Before the guard of the lock, so that it is dropped after that, also where something panics.
        let mut attendance = Attendance {
            engine: self,
            id: None,
        };
        let mut state = self.lock();
        let account = match state.ranges.get(id) {
            Some(mut range) if !range.closed => {
                (range.closed, range.attended) = (true, true);
                range.account
            }
            _ => return Ok(()),
        };
        attendance.id = Some(id);
        // What it was guaranteed others may have now; what it holds is on its account until it is given back.
        state.ledger.close(account);
        // An allocation of another thread that is under way ends first, and so does a move.
        while (state.ranges.get(id)).is_some_and(|range| range.is_awaited_by_close()) {
            state = self.wait(state);
        }
        let handle = state.ranges.handle(id).cloned();
        drop(state);
        let mut leased = false;
        if let Some(handle) = &handle {
            self.ask_tokens(handle, Asker::Waiting);
            let mut state = self.lock();
            let mut range = handle.lock();
            let unused = range.free_all();
            leased = range.waits_for_leases();
            handle.note(&range);
            drop(range);
            if leased {
                // Now, since another thread may find the last lease over, and then nobody else may be left to finish.
                state.kept = Some(self.clone());
            }
            self.retire(state, id, unused);
        }
        if leased {
            self.worker.wake(self, false);
        }
        self.poll();
        let mut drained = Ok(());
        loop {
            // What the device has finished with does not wait for the rest.
            drained = self.give_up(Some(id), |_| false).1.and(drained);
            let mut state = self.lock();
            let Some(range) = state.ranges.get(id) else {
                break;
            };
            let parts = range.pages.parts();
            let retires = !range.pages.in_state(ChunkState::Retiring).is_empty();
            let is_worked_on = parts.retiring_bytes > 0 || range.pages.is_worked_on();
            // Someone may have seen just now that more is past.
            let has_spare = range.spare_parked_bytes() + parts.ahead_bytes > 0;
            drop(range);
            if has_spare {
                continue;
            }
            if retires {
                match self.await_progress(state, Some(id))? {
                    Some(_) => {}
                    // A capture is declared: the worker finishes when it is over.
                    None => {
                        drop(attendance);
                        self.worker.keep(self);
                        return Ok(());
                    }
                }
            } else if parts.retiring_bytes > 0 && !AtWork::any() {
                // Someone else is unmapping the last chunks.
                state = self.wait(state);
                drop(state);
            } else {
                if is_worked_on {
                    // Work that is not waited for. Whoever does it goes on, or else the engine's next step.
                    state.kept = Some(self.clone());
                }
                break;
            }
        }
        drop(attendance);
        // What others let go since the last look, and left because the range was attended.
        drained = self.give_up(Some(id), |_| false).1.and(drained);
        self.finish_closing();
        let mut state = self.lock();
        // Someone else may be freeing the addresses.
        while state.ending.contains(&id) && !AtWork::any() {
            state = self.wait(state);
        }
        let is_kept = state.kept.is_some();
        drop(state);
        if is_kept {
            self.worker.wake(self, false);
        }
        drained
    }

    /// Goes on with the closing of ranges that was left to this thread, as far as it goes without waiting.
    pub(super) fn go_on_closing(self: &Arc<Self>) {
        self.poll();
        self.give_back();
        self.finish_closing();
    }

    /// Frees the addresses of closed ranges that hold nothing any more.
    pub(super) fn finish_closing(&self) {
        let mut state = self.lock();
        let empty: Vec<_> = state
            .ranges
            .iter()
            .filter(|(_, range)| range.closed && range.pages.chunks() == 0)
            .map(|(id, _)| id)
            .collect();
        if empty.is_empty() {
            return;
        }
        let done: Vec<Remains> = empty
            .iter()
            .filter_map(|id| state.ranges.remove(*id))
            .collect();
        for range in &done {
            state.counters.ranges.add(&range.counters);
        }
        state.ending.extend(&empty);
        drop(state);
        // Dropped without the lock: what the driver refuses goes to the device's quarantine.
        drop(done);
        let mut state = self.lock();
        state.ending.retain(|id| !empty.contains(id));
        // The last owner may be the engine itself, for the sake of these ranges.
        let any_closed = state.ranges.values().any(|range| range.closed);
        let kept = match any_closed {
            true => None,
            false => state.kept.take(),
        };
        drop(state);
        drop(kept);
    }
}
