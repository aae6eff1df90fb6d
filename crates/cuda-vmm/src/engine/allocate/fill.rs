//! The last part of a try: taking the pages that are there, and backing those that are missing.

use super::attempt::{Attempt, Need, Outcome};
use crate::engine::at_work::AtWork;
use crate::engine::backing::{Failure, Made, Supply, Target};
use crate::engine::books::chunk_plan::ChunkPlan;
use crate::engine::books::range_id::RangeId;
use crate::engine::changes::Locked;
use crate::engine::inner::Inner;
use crate::engine::range::{Range, Taken};
use crate::engine::relief::Relief;
use crate::engine::state::State;
use crate::events::Entered;
use crate::sync::{Arc, MutexGuard};
use crate::{Result, VmmError};
use core::ops;

/// Pages that are being backed for an allocation, for which the account is charged already.
struct Filling<'a> {
    engine: &'a Arc<Inner>,
    id: RangeId,
    bytes: ops::Range<usize>,
    plan: ChunkPlan,
    /// The runs of pages that the plan backs.
    runs: Vec<ops::Range<usize>>,
    target: Target,
    supply: Supply,
}

impl<'a> Attempt<'a> {
    /// Makes the bytes live. After an error the state is what it was, except what the driver would
    /// not take back.
    pub(super) fn fill(
        &mut self,
        mut state: Locked<'a>,
        mut range: MutexGuard<'a, Range>,
        need: Need,
        supply: Supply,
    ) -> Result<Outcome<'a>> {
        let (engine, id) = (self.engine(), self.handle.id());
        let (bytes, plan) = (need.extent.range(), need.plan);
        state.queue.follow(id, &plan.survey.retiring);
        if plan.survey.missing.is_empty() {
            let taken = range.take(&bytes, &plan.survey);
            // What was parked is in use again.
            drop((range, state));
            return Ok(Outcome::Done(taken));
        }
        let seen = engine.device.memory_events();
        let is_late = range.options.ahead_bytes_max > 0;
        range.counters.late_prefetches += u64::from(is_late);
        let mut filling = Filling {
            engine,
            id,
            runs: plan.runs().collect(),
            bytes,
            plan,
            target: Target::of(&range).ok_or(VmmError::Closed)?,
            supply,
        };
        let work = filling.begin(&mut range);
        drop((range, state));
        let _span = Entered::new(|| {
            let (offset, bytes) = (filling.bytes.start, filling.bytes.len());
            tracing::debug_span!("fill", offset, bytes)
        });
        if is_late {
            crate::events::debug!("memory that was to be made ahead is not there yet");
        }
        let made = {
            let _caller = engine.device.call_for_someone();
            filling.back(&mut self.relief)
        };
        match filling.finish(work, made) {
            Ok(taken) => Ok(Outcome::Done(taken)),
            Err(error) if error.is_out_of_memory() => Ok(Outcome::DeviceShort { error, seen }),
            Err(error) => Err(error),
        }
    }
}

impl Filling<'_> {
    /// Takes the pages in the books, so that no other thread makes them.
    fn begin(&self, range: &mut Range) -> AtWork {
        range
            .pages
            .begin(&self.bytes, &self.plan.survey, &self.runs);
        AtWork::begin()
    }

    /// Makes chunks for all missing pages, or none. Spare pages may stay without.
    fn back(&mut self, relief: &mut Relief) -> Result<Vec<Made>, Failure> {
        // Chunks still to be made, the next one last.
        let mut left = self.plan.chunks();
        left.reverse();
        let mut done: Vec<Made> = Vec::with_capacity(left.len());
        while let Some(pages) = left.pop() {
            let mut failure = match self.target.make(&pages, &mut self.supply, || ()) {
                Ok(made) => {
                    done.push(made);
                    continue;
                }
                Err(failure) => failure,
            };
            let Some(instead) = self.instead_of(pages, &mut failure, relief) else {
                for made in done.into_iter().rev() {
                    failure.undo(made);
                }
                return Err(failure);
            };
            left.extend(instead);
        }
        Ok(done)
    }

    /// What to make instead of a chunk that could not be made, the next one last; `None` if nothing
    /// helps.
    ///
    /// If the budget had room but the device has no memory, engines of the device give up what they
    /// can spare, a piece at a time, then others in the process do, and then smaller chunks may
    /// still find room.
    fn instead_of(
        &mut self,
        pages: ops::Range<usize>,
        failure: &mut Failure,
        relief: &mut Relief,
    ) -> Option<Vec<ops::Range<usize>>> {
        if !(failure.error.is_out_of_memory() && failure.is_clean()) {
            return None;
        }
        let bytes = pages.len() * self.target.page_bytes;
        if relief.is_news() {
            self.engine.state.lock().counters.device_shortages += 1;
            let error = &failure.error;
            crate::events::warn!(%error, bytes, "the device has no memory though the budget has room");
        }
        if relief.next(self.engine, self.id, bytes) {
            self.supply.append(&mut failure.cached);
            return Some(vec![pages]);
        }
        // Memory that is there already is not what the device has too little of.
        if !(failure.cached.is_empty() && self.plan.may_halve(&pages)) {
            return None;
        }
        let middle = pages.start + pages.len() / 2;
        let halves = [middle..pages.end, pages.start..middle].into_iter();
        Some(halves.filter(|half| self.plan.is_asked_for(half)).collect())
    }

    /// Ends the filling in the books.
    fn finish(self, work: AtWork, mut made: Result<Vec<Made>, Failure>) -> Result<Taken> {
        let engine = self.engine;
        let mut state = engine.state.lock();
        let is_closed = |state: &State| state.ranges.get(self.id).is_none_or(|range| range.closed);
        if made.is_ok() && is_closed(&state) {
            // Nobody gets these pages. A thread that closed the range from within this work has not
            // waited for it.
            drop(state);
            made = made.and_then(|chunks| Err(Failure::of(VmmError::Closed, chunks)));
            state = engine.state.lock();
        }
        match made {
            Ok(chunks) => self.succeed(work, state, chunks),
            Err(failure) => self.fail(work, state, failure),
        }
    }

    fn succeed(self, work: AtWork, mut state: Locked<'_>, chunks: Vec<Made>) -> Result<Taken> {
        let State { ranges, ledger, .. } = &mut *state;
        // The range cannot have gone: it ends with its last chunk, and some are being filled.
        let Some(mut range) = ranges.get(self.id) else {
            return Err(VmmError::Closed);
        };
        let made_pages: usize = chunks.iter().map(|made| made.pages.len()).sum();
        let chunks = chunks.into_iter().map(|made| (made.pages, made.mapping));
        range.pages.finish(&self.bytes, &self.runs, chunks);
        let unmade_pages = self.plan.pages() - made_pages;
        ledger.refund(range.account, unmade_pages * self.target.page_bytes);
        let taken = range.taken(&self.bytes);
        drop((work, range));
        drop(state);
        Ok(taken)
    }

    fn fail(self, work: AtWork, mut state: Locked<'_>, mut failure: Failure) -> Result<Taken> {
        let engine = self.engine;
        // As above.
        let Some(mut range) = state.ranges.get(self.id) else {
            return Err(VmmError::Closed);
        };
        let account = range.account;
        let still_mapped = core::mem::take(&mut failure.still_mapped);
        let kept_bytes = still_mapped.iter().map(|(_, mapping)| mapping.bytes());
        let kept_bytes = kept_bytes.sum();
        let pages = &mut range.pages;
        let unused = pages.abort(&self.bytes, &self.plan.survey, &self.runs, still_mapped);
        let is_left = range.is_left();
        drop(range);
        let charged_bytes = self.plan.pages() * self.target.page_bytes;
        state.settle(
            account,
            charged_bytes,
            kept_bytes,
            &mut failure,
            self.supply,
        );
        drop(work);
        engine.retire(state, self.id, unused);
        if is_left {
            engine.go_on_closing();
        }
        // Something may be stuck, or parked again.
        engine.worker.wake(engine, false);
        Err(failure.error)
    }
}
