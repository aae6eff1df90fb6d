//! How freed chunks are parked: recorded behind fences, looked at, and waited for.

use super::at_work::AtWork;
use super::books::range_id::RangeId;
use super::books::tally::Fact;
use super::changes::Locked;
use super::inner::Inner;
use super::queue::{BITE, Until};
use super::range::leases::Asker;
use super::scope::Scope;
use super::slot::Slot;
use super::state::State;
use super::users::Users;
use crate::sync::{Arc, rest};
use crate::sys::CUDA_ERROR_CAPTURED_EVENT;
use crate::{CaptureGuard, Fence, Result, VmmError};

/// Chunks of a range that were freed, and whose work on them has to be past.
#[derive(Debug)]
pub(crate) struct Freed {
    slot: Slot,
    users: Users,
    chunks: Vec<usize>,
}

impl Freed {
    pub(crate) fn new(slot: &Slot, users: Users, chunks: Vec<usize>) -> Self {
        let slot = slot.clone();
        Self {
            slot,
            users,
            chunks,
        }
    }
}

impl Inner {
    /// Records when the freed chunks of a range will be free of the device, and wakes the worker
    /// for it.
    pub(crate) fn retire(self: &Arc<Self>, state: Locked<'_>, id: RangeId, chunks: Vec<usize>) {
        let freed = state.ranges.slot(id).filter(|_| !chunks.is_empty());
        let freed = freed.cloned();
        // Before the change is told: that runs code of others.
        let _work = AtWork::begin();
        drop(state);
        if let Some(slot) = freed {
            let users = slot.lock().users.clone();
            self.record([Freed::new(&slot, users, chunks)]);
        }
    }

    /// As [`retire`](Self::retire), without the engine's lock: each range keeps what was freed
    /// until a thread looks at the queue. Ranges with the same users, one after the other, share
    /// fences.
    pub(crate) fn record(self: &Arc<Self>, all: impl IntoIterator<Item = Freed>) {
        // In this thread's hands until the ranges have them: the driver is called, and owners of
        // streams may be dropped.
        let work = AtWork::begin();
        let mut last: Option<(Users, Until)> = None;
        for freed in all {
            let users = freed.slot.settle_users(freed.users);
            let until = match last {
                Some((same, until)) if same.are(&users) => until,
                _ => Until::now(&self.device, &users),
            };
            let mut range = freed.slot.lock();
            range.freed.push_back((freed.chunks, until.clone()));
            drop(range);
            last = Some((users, until));
        }
        drop(work);
        if last.is_some() {
            self.state.tell();
            self.worker.wake(self, false);
        }
    }

    /// Looks which leases are over, and parks the chunks that the device has finished with, as far
    /// as fences tell; returns their bytes. Of shared chunks it unmaps them. Never waits.
    pub(crate) fn poll(self: &Arc<Self>) -> usize {
        let bytes = self.look_at_queue(|_| false);
        self.unmap_leaving(Scope::All);
        bytes
    }

    /// As [`poll`](Self::poll), after a fence was waited for: ends with the first entries of which
    /// none is past. Later ones hardly are, and a thread that waits for one after the other would
    /// ask for all of them each time.
    fn poll_first(self: &Arc<Self>) -> usize {
        self.look_at_queue(|bytes| bytes == 0)
    }

    fn look_at_queue(self: &Arc<Self>, is_enough: impl Fn(usize) -> bool) -> usize {
        self.collect_work();
        let mut numbers = 0..self.state.lock().queue.end();
        let mut bytes = 0;
        loop {
            let conditions = self.state.lock().queue.conditions(numbers.clone());
            let Some((last, _)) = conditions.last() else {
                return bytes;
            };
            numbers.start = last + 1;
            let is_last = conditions.len() < BITE;
            let parked_bytes = self.park_past(conditions);
            bytes += parked_bytes;
            if is_last || is_enough(parked_bytes) {
                return bytes;
            }
            rest();
        }
    }

    /// Parks the chunks of those entries that are past; returns their bytes.
    fn park_past(&self, conditions: Vec<(u64, Until)>) -> usize {
        let (mut past, mut captured) = (Vec::new(), Vec::new());
        let mut asked: Option<(&Until, bool)> = None;
        for (id, until) in &conditions {
            // What was freed by one call has the same fences.
            let is_past = match asked {
                Some((same, is_past)) if same.is(until) => Ok(is_past),
                _ => until.is_past(),
            };
            match is_past {
                Ok(is_past) => {
                    asked = Some((until, is_past));
                    past.extend(is_past.then_some(*id));
                }
                // A capture began between the question whether there is one and the record.
                Err(error) if is_captured(&error) => captured.push(*id),
                // A fence that cannot be asked now is asked again at the next step.
                Err(_) => {}
            }
        }
        if !captured.is_empty() {
            let fences = self.state.lock().queue.give_up_fences(&captured);
            drop(fences);
        }
        self.park(&past)
    }

    /// Collects the work that ranges have for a step. It puts freed chunks into the queue. Chunks
    /// that were freed under a lease that is over retire behind a fence of now.
    fn collect_work(self: &Arc<Self>) {
        self.collect_freed();
        let mut state = self.state.lock();
        let leased = state.quietly().look_again().with(Fact::WaitsForLeases);
        let leased: Vec<_> = leased.collect();
        let leased = leased.into_iter().filter_map(|id| state.ranges.slot(id));
        let leased: Vec<_> = leased.cloned().collect();
        drop(state);
        if leased.is_empty() {
            return;
        }
        for slot in &leased {
            slot.ask_tokens(Asker::Passing, None);
            self.sweep(slot);
        }
        self.collect_freed();
    }

    /// Puts all that was freed so far into the queue.
    fn collect_freed(&self) {
        while self.state.lock().quietly().collect_freed() == BITE {
            rest();
        }
    }

    /// Frees what was freed before and is leased no longer.
    fn sweep(self: &Arc<Self>, slot: &Slot) {
        let mut unused = Vec::new();
        let mut any = false;
        let users = loop {
            let mut range = slot.lock();
            let swept = range.sweep_leases(BITE, &mut unused);
            any |= swept > 0;
            if swept < BITE {
                break range.users.clone();
            }
            drop(range);
            rest();
        };
        if !unused.is_empty() {
            self.record([Freed::new(slot, users, unused)]);
        } else if any {
            self.state.tell();
        }
    }

    /// Parks the chunks of entries that are past; returns their bytes.
    fn park(&self, ids: &[u64]) -> usize {
        let mut bytes = 0;
        let mut ids = ids.iter().copied().peekable();
        while ids.peek().is_some() {
            let mut state = self.state.lock();
            let mut room = BITE;
            let mut done = Vec::new();
            while room > 0
                && let Some(id) = ids.peek()
            {
                let State { queue, ranges, .. } = &mut *state;
                let Some((range, chunks, entry)) = queue.take(*id, room) else {
                    // Another thread was faster.
                    ids.next();
                    continue;
                };
                room = room.saturating_sub(chunks.len().max(1));
                if let Some(mut range) = ranges.get(range) {
                    for first in chunks {
                        bytes += range.pages.chunk_bytes(first);
                        range.pages.park(first);
                    }
                }
                if entry.is_some() {
                    ids.next();
                }
                done.extend(entry);
            }
            drop(state);
            // The fences go here, without the lock: dropping them calls the driver.
            drop(done);
            if ids.peek().is_some() {
                rest();
            }
        }
        if bytes > 0 {
            // An allocation for which the device has no memory can take it.
            self.device.note_memory();
        }
        bytes
    }

    /// Waits for all work of the context, then parks what waited for that, of the ranges in scope;
    /// returns the bytes. `None` if nothing waits for it, or if a capture is declared.
    pub(crate) fn synchronise(&self, scope: Scope) -> Result<Option<usize>> {
        let (waiting, all) = {
            let mut state = self.state.lock();
            let all = state.quietly().look_again().any(Fact::UsedByAll);
            (state.unsynchronised(scope), all)
        };
        if waiting.is_empty() {
            return Ok(None);
        }
        let Some(no_capture) = CaptureGuard::try_none() else {
            return Ok(None);
        };
        let synchronised = self.device.finish_work(all);
        // Before the change is told: that may run code of others, which may begin a capture.
        drop(no_capture);
        match synchronised {
            Err(error) if !error.is_poisoned() => Err(error),
            // Done; or poisoned, and then nothing runs any more.
            _ => Ok(Some(self.park(&waiting))),
        }
    }

    /// Waits for one thing that can bring memory back, to a range in scope: a fence, a context
    /// synchronise, or another thread's work. Returns whether there was any, or why it cannot be
    /// waited for.
    pub(crate) fn await_progress<'a>(
        self: &'a Arc<Self>,
        mut state: Locked<'a>,
        scope: Scope,
    ) -> Result<Option<Locked<'a>>> {
        state.quietly().collect_freed();
        if state.quietly().look_again().any(Fact::Leaving) {
            // Of another range, perhaps, whose steps no thread takes.
            drop(state);
            self.unmap_leaving(Scope::All);
            return Ok(Some(self.state.lock()));
        }
        if let Some((id, fences)) = state.quietly().first_fences(scope) {
            state.quietly().counters.waits += 1;
            drop(state);
            self.await_fences(id, &fences)?;
            // Before the lock is taken: it may be the last to hold them, and dropping a fence calls
            // the driver.
            drop(fences);
            return Ok(Some(self.state.lock()));
        }
        if !state.unsynchronised(scope).is_empty() {
            state.quietly().counters.waits += 1;
            drop(state);
            // `None` also if another thread was faster: then the caller looks again.
            let synchronised = self.synchronise(scope)?.is_some();
            let may_go_on = synchronised || !CaptureGuard::any();
            return Ok(may_go_on.then(|| self.state.lock()));
        }
        let stats = state.quietly().parts();
        // What is freed now and has no fence yet is retiring too.
        if stats.filling_bytes + stats.retiring_bytes > 0 && !AtWork::any() {
            return Ok(Some(self.state.wait(state)));
        }
        Ok(None)
    }

    /// Waits for the fences of an entry of the queue, and parks what they were for.
    fn await_fences(self: &Arc<Self>, id: u64, fences: &[Arc<Fence>]) -> Result<()> {
        crate::events::debug!("waits for the device");
        let mut waited = fences.iter().map(|fence| fence.wait());
        let stopped = waited.find(|waited| match waited {
            Err(error) => !error.is_poisoned(),
            Ok(()) => false,
        });
        match stopped {
            // Not asked again: with a driver that never says so this would wait for ever.
            None | Some(Ok(())) => {
                self.park(&[id]);
                self.poll_first();
            }
            Some(Err(error)) if is_captured(&error) => {
                let captured = self.state.lock().queue.give_up_fences(&[id]);
                drop(captured);
            }
            Some(Err(error)) => return Err(error),
        }
        Ok(())
    }
}

impl State {
    /// The first entry of the queue whose chunks come back to a range in scope when fences are
    /// past.
    fn first_fences(&mut self, scope: Scope) -> Option<(u64, Arc<Vec<Arc<Fence>>>)> {
        match scope {
            Scope::Range(id) => self.queue.first_fences(id),
            _ => (self.queue).first_fences_of(|id| self.ranges.covers(scope, id)),
        }
    }

    /// Numbers of the entries of ranges in scope that need a context synchronise.
    fn unsynchronised(&self, scope: Scope) -> Vec<u64> {
        let is_meant = |id| self.ranges.covers(scope, id);
        self.queue.unsynchronised(is_meant)
    }
}

/// Whether a fence was recorded into a capture that began between the question and the record.
fn is_captured(error: &VmmError) -> bool {
    error.driver_code() == Some(CUDA_ERROR_CAPTURED_EVENT)
}
