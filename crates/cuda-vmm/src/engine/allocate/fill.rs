//! The last part of a try: taking the pages that are there, and backing those that are missing.

use super::ask::Ask;
use super::attempt::{Attempt, Outcome};
use super::need::{Need, Needs};
use crate::engine::at_work::AtWork;
use crate::engine::backing::{Failure, Supply};
use crate::engine::books::range_id::RangeId;
use crate::engine::changes::Locked;
use crate::engine::inner::Inner;
use crate::engine::range::{Range, Taken};
use crate::engine::relief::Relief;
use crate::engine::slot::RangeLock;
use crate::engine::state::State;
use crate::events::Entered;
use crate::sync::Arc;
use crate::{Result, VmmError};
use core::ops;

/// Pages that are being backed for an allocation, for which the account is charged already.
struct Filling<'a> {
    asks: &'a [Ask<'a>],
    pieces: Vec<Need>,
    supply: Supply,
}

impl<'a> Attempt<'a> {
    /// Makes the bytes live. After an error the state is what it was, except what the driver would
    /// not take back. `held` is the lock of the only range.
    pub(super) fn fill(
        &mut self,
        mut state: Locked<'a>,
        held: Option<RangeLock<'a>>,
        mut needs: Needs,
        supply: Supply,
    ) -> Result<Outcome<'a>> {
        let engine = self.engine();
        let (asks, more_bytes) = (self.asks, needs.more_bytes);
        let seen = engine.device.memory_events();
        let work = AtWork::begin();
        if let Some(mut range) = held {
            let handle = asks[0].handle;
            if let [need] = &needs.pieces[..]
                && need.plan.survey.missing.is_empty()
            {
                self.want_no_more(&mut state, needs.more_bytes);
                let survey = &need.plan.survey;
                state.queue.follow(handle.id(), &survey.retiring);
                let taken = range.take(&need.extent.range(), survey);
                // What was parked is in use again.
                drop((work, range, state));
                return Ok(Outcome::Done(taken));
            }
            begin(&needs.pieces, &mut state, &mut range, handle.id());
        } else {
            let charged_bytes = needs.bytes();
            let mut begun = 0;
            for pieces in needs.pieces.chunk_by(|one, next| one.ask == next.ask) {
                let handle = asks[pieces[0].ask].handle;
                let mut range = handle.slot.lock();
                if !pieces.iter().all(|need| need.is_still_true(&range)) {
                    drop(range);
                    needs.pieces.truncate(begun);
                    let filling = Filling::new(asks, needs.pieces, supply);
                    return Ok(filling.take_back(work, state, charged_bytes));
                }
                begin(pieces, &mut state, &mut range, handle.id());
                begun += pieces.len();
            }
        }
        let mut filling = Filling::new(asks, needs.pieces, supply);
        self.want_no_more(&mut state, more_bytes);
        drop(state);
        let _span = Entered::new(|| {
            let (offset, bytes) = filling.first();
            tracing::debug_span!("fill", offset, bytes)
        });
        let made = {
            let _urgent = engine.device.begin_urgent_call();
            filling.back(&mut self.relief)
        };
        match filling.finish(work, made) {
            Ok(taken) => Ok(Outcome::Done(taken)),
            Err(error) if error.is_out_of_memory() => Ok(Outcome::DeviceShort { error, seen }),
            Err(error) => Err(error),
        }
    }
}

/// Takes the pages of a range in the books, so that no other thread makes them.
fn begin(pieces: &[Need], state: &mut Locked<'_>, range: &mut Range, id: RangeId) {
    let is_missing = pieces.iter().any(|need| need.target.is_some());
    if is_missing && range.options.ahead_bytes_max > 0 {
        range.counters.late_prefetches += 1;
        crate::events::debug!("memory that was to be made ahead is not there yet");
    }
    for need in pieces {
        let survey = &need.plan.survey;
        state.queue.follow(id, &survey.retiring);
        let bytes = need.extent.range();
        range.pages.begin(&bytes, survey, need.plan.runs());
    }
}

impl Need {
    /// Undoes all that was made for it.
    fn undo(&mut self) {
        self.left.undo(core::mem::take(&mut self.made));
    }

    /// Makes chunks for all missing pages, or none. Spare pages may stay without.
    fn back(&mut self, supply: &mut Supply, relief: &mut Relief, asks: &[Ask<'_>]) -> Result<()> {
        let Some(target) = &self.target else {
            return Ok(());
        };
        let mut chunks = self.plan.chunks();
        // Chunks to be made before these, the next one last.
        let mut first = Vec::new();
        while let Some(pages) = first.pop().or_else(|| chunks.next()) {
            let mut failure = match target.make(&pages, supply, || ()) {
                Ok(made) => {
                    self.made.push(made);
                    continue;
                }
                Err(failure) => failure,
            };
            let instead = self.instead_of(pages, &mut failure, relief, asks);
            supply.append(&mut failure.left.cached);
            let Some(instead) = instead else {
                drop(chunks);
                self.left = failure.left;
                self.undo();
                return Err(failure.error);
            };
            first.extend(instead);
        }
        Ok(())
    }

    /// What to make instead of a chunk that could not be made, the next one last; `None` if nothing
    /// helps.
    ///
    /// If the budget had room but the device has no memory, engines of the device give up what they
    /// can spare, a piece at a time, then others in the process do, and then smaller chunks may
    /// still find room.
    fn instead_of(
        &self,
        pages: ops::Range<usize>,
        failure: &mut Failure,
        relief: &mut Relief,
        asks: &[Ask<'_>],
    ) -> Option<Vec<ops::Range<usize>>> {
        if !(failure.error.is_out_of_memory() && failure.left.is_clean()) {
            return None;
        }
        let engine = asks[self.ask].handle.inner();
        let bytes = pages.len() * self.page_bytes;
        if relief.is_first() {
            engine.state.lock().counters.device_shortages += 1;
            let error = &failure.error;
            crate::events::warn!(%error, bytes, "the device has no memory though the budget has room");
        }
        let ranges: Vec<_> = asks.iter().map(Ask::range).collect();
        if relief.next(engine, &ranges, bytes) {
            return Some(vec![pages]);
        }
        // Memory that is there already is not what the device has too little of.
        if !(failure.left.cached.is_empty() && self.plan.may_halve(&pages)) {
            return None;
        }
        let middle = pages.start + pages.len() / 2;
        let halves = [middle..pages.end, pages.start..middle].into_iter();
        Some(halves.filter(|half| self.plan.is_asked_for(half)).collect())
    }

    /// Ends its filling in the books: its bytes are live.
    fn succeed(self, state: &mut State, asks: &[Ask<'_>]) -> Option<Taken> {
        let State { ranges, ledger, .. } = state;
        // The range cannot have gone: it ends with its last chunk, and some are being filled; or
        // the caller holds its handle.
        let mut range = ranges.get(asks[self.ask].range())?;
        let bytes = self.extent.range();
        let made_pages: usize = self.made.iter().map(|made| made.pages.len()).sum();
        let unmade_pages = self.plan.pages() - made_pages;
        let chunks = self.made.into_iter();
        let chunks = chunks.map(|made| (made.pages, made.mapping));
        range.with_leased_pages(&bytes, |range| range.pages.finish(&bytes, chunks));
        ledger.refund(range.account, unmade_pages * self.page_bytes);
        Some(range.taken(&bytes))
    }

    /// Ends its filling in the books: all is as before. Returns the chunks that are unused now, and
    /// whether only this thread can go on with the closing of the range.
    fn fail(&mut self, state: &mut State, id: RangeId) -> (Vec<usize>, bool) {
        let charged_bytes = self.bytes();
        // As above.
        let Some(mut range) = state.ranges.get(id) else {
            return (Vec::new(), false);
        };
        let owner = range.owner(id);
        let still_mapped = core::mem::take(&mut self.left.still_mapped);
        let kept_bytes = still_mapped.iter().map(|(_, mapping)| mapping.bytes());
        let kept_bytes = kept_bytes.sum();
        let (bytes, plan) = (self.extent.range(), &self.plan);
        let unused = (range.pages).abort(&bytes, &plan.survey, plan.runs(), still_mapped);
        let is_left = range.is_left();
        drop(range);
        state.settle(owner, charged_bytes, kept_bytes, &mut self.left);
        (unused, is_left)
    }
}

impl<'a> Filling<'a> {
    fn new(asks: &'a [Ask<'a>], pieces: Vec<Need>, supply: Supply) -> Self {
        Self {
            asks,
            pieces,
            supply,
        }
    }

    fn engine(&self) -> &'a Arc<Inner> {
        self.asks[0].handle.inner()
    }

    /// Where it begins, and how many bytes it makes live.
    fn first(&self) -> (usize, usize) {
        let first = self.pieces.first().map_or(0, |piece| piece.extent.offset);
        let bytes = self.pieces.iter().map(|piece| piece.extent.bytes);
        (first, bytes.sum())
    }

    /// Makes chunks for all pieces, or none.
    fn back(&mut self, relief: &mut Relief) -> Result<()> {
        for at in 0..self.pieces.len() {
            let made = self.pieces[at].back(&mut self.supply, relief, self.asks);
            if let Err(error) = made {
                let before = self.pieces[..at].iter_mut().rev();
                before.for_each(Need::undo);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Ends the filling in the books.
    fn finish(mut self, work: AtWork, mut made: Result<()>) -> Result<Taken> {
        let engine = self.engine();
        let mut state = engine.state.lock();
        let is_closed = |state: &State| {
            let mut ranges = self.asks.iter().map(|ask| state.ranges.get(ask.range()));
            ranges.any(|range| range.is_none_or(|range| range.takes_no_more()))
        };
        if made.is_ok() && is_closed(&state) {
            // No allocation gets these pages. A thread that closed the range from within this work
            // has not waited for it.
            drop(state);
            self.pieces.iter_mut().rev().for_each(Need::undo);
            made = Err(VmmError::Closed);
            state = engine.state.lock();
        }
        state.restock(core::mem::take(&mut self.supply));
        match made {
            Ok(()) => self.succeed(work, state),
            Err(error) => {
                self.fail(work, state);
                Err(error)
            }
        }
    }

    fn succeed(self, work: AtWork, mut state: Locked<'_>) -> Result<Taken> {
        let mut all: Option<Taken> = None;
        for piece in self.pieces {
            let taken = piece
                .succeed(&mut state, self.asks)
                .ok_or(VmmError::Closed)?;
            match &mut all {
                Some(all) => all.is_hungry |= taken.is_hungry,
                None => all = Some(taken),
            }
        }
        drop(work);
        drop(state);
        all.ok_or(VmmError::Closed)
    }

    /// Undoes in the books what was begun.
    fn fail(mut self, work: AtWork, mut state: Locked<'_>) {
        let engine = self.engine();
        let mut any_left = false;
        let mut unused: Vec<(RangeId, Vec<usize>)> = Vec::new();
        for piece in self.pieces.iter_mut().rev() {
            let id = self.asks[piece.ask].range();
            let (chunks, is_left) = piece.fail(&mut state, id);
            any_left |= is_left;
            unused.push((id, chunks));
        }
        let mut state = Some(state);
        for (id, chunks) in unused {
            let state = state.take().unwrap_or_else(|| engine.state.lock());
            engine.retire(state, id, chunks);
        }
        // Still held if nothing was begun.
        drop(state);
        drop(work);
        if any_left {
            engine.go_on_closing();
        }
        // Something may be stuck, or parked again.
        engine.worker.wake(engine, false);
    }

    /// Takes back what was begun, and the charge for all: another thread has changed what was
    /// found, so the allocation looks again.
    fn take_back(
        mut self,
        work: AtWork,
        mut state: Locked<'a>,
        charged_bytes: usize,
    ) -> Outcome<'a> {
        let engine = self.engine();
        state.restock(core::mem::take(&mut self.supply));
        let begun_bytes: usize = self.pieces.iter().map(Need::bytes).sum();
        let rest_bytes = charged_bytes - begun_bytes;
        state.ledger.refund(self.asks[0].account(), rest_bytes);
        self.fail(work, state);
        Outcome::Again(engine.state.lock())
    }
}
