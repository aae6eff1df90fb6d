//! Ending a range: its bytes die, its memory goes back when the device has finished with it, its
//! addresses after that.

use super::at_work::AtWork;
use super::books::owner::Owner;
use super::books::pages::ChunkState;
use super::books::range_id::RangeId;
use super::books::tally::Fact;
use super::handle::RangeHandle;
use super::inner::Inner;
use super::range::Remains;
use super::range::leases::Asker;
use super::range::rest::Rest;
use super::scope::Scope;
use crate::Result;
use crate::sync::Arc;
use core::ops::ControlFlow;

/// A thread is closing a range while this lives. Dropping it takes the engine's lock.
struct Closer<'a> {
    engine: &'a Inner,
    /// The range, from when it is marked.
    id: Option<RangeId>,
}

impl Drop for Closer<'_> {
    fn drop(&mut self) {
        let Some(id) = self.id else {
            return;
        };
        if let Some(mut range) = self.engine.state.lock().ranges.get(id) {
            range.has_closer = false;
        }
    }
}

impl<'a> Closer<'a> {
    /// Marks a range as closed, and as being closed by this thread; `None` if it is closed already.
    /// An allocation of another thread that is under way ends first, and so does a move.
    fn begin(engine: &'a Inner, owner: Owner) -> Option<Self> {
        // Before the guard of the lock, so that it is dropped after that, also if something panics.
        let mut closer = Self { engine, id: None };
        let id = owner.range;
        let mut state = engine.state.lock();
        match state.ranges.get(id) {
            Some(mut range) if !range.closed => {
                (range.closed, range.has_closer) = (true, true);
            }
            _ => return None,
        }
        closer.id = Some(id);
        // What it holds is on its account until it is given back.
        state.ledger.close_range(owner);
        state.starved.forget(id);
        while (state.ranges.get(id)).is_some_and(|range| range.is_awaited_by_close()) {
            state = engine.state.wait(state);
        }
        drop(state);
        Some(closer)
    }
}

/// What a thread that closes a range leaves when it has waited for all that it may wait for.
enum Left {
    /// Nothing, or what another thread or the engine's next step does.
    Nothing,
    /// What retires. A capture is declared: the worker finishes when it is over.
    ToTheWorker,
}

impl RangeHandle {
    /// Ends the range. Waits for the device and for other threads' work on it, but not for the end
    /// of a declared capture, nor for threads if that could be this thread's own work, or waits for
    /// this one: then, and if the driver refuses, the engine keeps the range and finishes later.
    pub(crate) fn close(&self) -> Result<()> {
        let engine = self.engine().open()?;
        let id = self.id();
        let Some(closer) = Closer::begin(engine, self.owner()) else {
            return Ok(());
        };
        if self.free_all(engine) {
            engine.worker.wake(engine, false);
        }
        engine.poll();
        let mut drained = Ok(());
        loop {
            // What the device has finished with does not wait for the rest.
            drained = engine.give_up(Scope::Range(id), |_| false).1.and(drained);
            match self.await_chunks(engine)? {
                ControlFlow::Continue(()) => {}
                ControlFlow::Break(Left::Nothing) => break,
                ControlFlow::Break(Left::ToTheWorker) => {
                    drop(closer);
                    engine.worker.keep(engine);
                    return Ok(());
                }
            }
        }
        drop(closer);
        // What others let go since the last look, and left because this thread was closing the
        // range.
        drained = engine.give_up(Scope::Range(id), |_| false).1.and(drained);
        engine.finish_closing();
        if self.await_ending(engine) {
            engine.worker.wake(engine, false);
        }
        drained
    }

    /// Frees all bytes of a closed range, except what is leased. Returns whether any is.
    fn free_all(&self, engine: &Arc<Inner>) -> bool {
        let slot = &self.slot;
        slot.ask_tokens(Asker::Waiting, None);
        let mut state = engine.state.lock();
        let mut range = slot.lock();
        let unused = range.free_all();
        let leased = range.waits_for_leases();
        let asleep = core::mem::replace(&mut range.rest, Rest::Awake(None));
        drop(range);
        if leased {
            // Now, since another thread may find the last lease over, and then no other thread may
            // be left to finish.
            state.kept = Some(engine.clone());
        }
        engine.retire(state, slot.id(), unused);
        // Without a lock: its host bytes may unpin memory.
        drop(asleep);
        leased
    }

    /// Waits for something that brings chunks of a closed range back, or says what is left.
    fn await_chunks(&self, engine: &Arc<Inner>) -> Result<ControlFlow<Left>> {
        let id = self.id();
        let mut state = engine.state.lock();
        let Some(range) = state.ranges.get(id) else {
            return Ok(ControlFlow::Break(Left::Nothing));
        };
        let parts = range.pages.parts();
        let retires = range.pages.any_in_state(ChunkState::Retiring);
        let drains = range.pages.any_in_state(ChunkState::Draining);
        let is_worked_on = retires || drains || range.pages.is_worked_on();
        // Another thread may have seen just now that more is past.
        let has_spare = range.spare_parked_bytes() + parts.ahead_bytes > 0;
        let has_spare = has_spare || range.leaving().is_some();
        drop(range);
        if has_spare {
            return Ok(ControlFlow::Continue(()));
        }
        if retires {
            let progress = engine.await_progress(state, Scope::Range(id))?;
            return Ok(match progress {
                Some(_) => ControlFlow::Continue(()),
                None => ControlFlow::Break(Left::ToTheWorker),
            });
        }
        if drains && !AtWork::any() {
            // Another thread is unmapping the last chunks.
            drop(engine.state.wait(state));
            return Ok(ControlFlow::Continue(()));
        }
        if is_worked_on {
            // Work that is not waited for. The thread that does it goes on, or else the engine's
            // next step.
            state.kept = Some(engine.clone());
        }
        Ok(ControlFlow::Break(Left::Nothing))
    }

    /// Waits until no other thread is freeing the range's addresses. Returns whether the engine is
    /// kept for closed ranges.
    fn await_ending(&self, engine: &Inner) -> bool {
        let id = self.id();
        let mut state = engine.state.lock();
        while state.ending.contains(&id) && !AtWork::any() {
            state = engine.state.wait(state);
        }
        state.kept.is_some()
    }
}

impl Inner {
    /// Goes on with the closing of ranges that was left to this thread, as far as it goes without
    /// waiting.
    pub(crate) fn go_on_closing(self: &Arc<Self>) {
        self.poll();
        self.give_back();
        self.finish_closing();
    }

    /// Frees the addresses of closed ranges that hold nothing any more.
    pub(crate) fn finish_closing(&self) {
        let mut state = self.state.lock();
        let empty: Vec<_> = state.quietly().look_again().with(Fact::Ended).collect();
        if empty.is_empty() {
            return;
        }
        let done: Vec<Remains> = empty
            .iter()
            .filter_map(|id| state.ranges.remove(*id))
            .collect();
        for range in &done {
            state.counters.ranges.add(&range.counters);
            state.accounts.add_counters(range.account, &range.counters);
        }
        state.ending.extend(&empty);
        drop(state);
        // Dropped without the lock: what the driver refuses goes to the device's quarantine.
        drop(done);
        let mut state = self.state.lock();
        state.ending.retain(|id| !empty.contains(id));
        // The last owner may be the engine itself, for the sake of these ranges.
        let any_closed = state.quietly().look_again().any(Fact::Closed);
        let kept = match any_closed {
            true => None,
            false => state.kept.take(),
        };
        drop(state);
        drop(kept);
    }
}
