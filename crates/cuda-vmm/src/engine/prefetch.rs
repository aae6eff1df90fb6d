//! Making memory before it is asked for, mapped and accessible: beyond the end of a range's latest
//! allocation, or where its owner says that the next ones will be.

use super::at_work::AtWork;
use super::backing::{Failure, Made};
use super::books::owner::Owner;
use super::books::range_id::RangeId;
use super::books::tally::Fact;
use super::changes::Locked;
use super::inner::Inner;
use super::queue::BITE;
use super::state::State;
use super::target::Target;
use crate::sync::{Arc, rest};
use crate::{PhysicalMemory, VmmError};
use core::ops;

/// A chunk that is to be made ahead of a range's allocations.
struct Ahead {
    owner: Owner,
    target: Target,
    pages: ops::Range<usize>,
}

impl Inner {
    /// Makes what is to be there ahead, a chunk at a time; returns the bytes made. The worker's
    /// thread rests in between.
    pub(crate) fn prefetch(self: &Arc<Self>, is_worker: bool) -> usize {
        let mut made_bytes = 0;
        while let Some(bytes) = self.prefetch_one() {
            made_bytes += bytes;
            if is_worker && bytes > 0 {
                rest();
            }
        }
        made_bytes
    }

    /// Looks after one range that wants memory ahead; `None` if none does.
    fn prefetch_one(self: &Arc<Self>) -> Option<usize> {
        let mut state = self.state.lock();
        let Some(ahead) = state.quietly().next_ahead(self.options.chunk_bytes_max)? else {
            return Some(0);
        };
        let bytes = ahead.bytes();
        let (account, chunk) = (ahead.owner.account, core::iter::once(bytes));
        let Ok(mut supply) = state.charge(account, bytes, chunk, None) else {
            // Nothing is given up for memory that no allocation needs yet.
            state.stop_prefetching(ahead.owner.range);
            let committed_bytes = state.ledger.committed_bytes();
            let starved = &mut state.quietly().starved;
            starved.refuse(ahead.owner.range, bytes, committed_bytes);
            drop(state);
            crate::events::debug!(bytes, "the budget has no room for memory made ahead");
            return Some(0);
        };
        if let Some(mut range) = state.ranges.get(ahead.owner.range) {
            range.quietly().pages.begin_ahead(ahead.pages.clone());
        }
        let work = AtWork::begin();
        drop(state);
        let give_way = || self.device.give_way();
        let made = ahead.target.make(&ahead.pages, &mut supply, give_way);
        let (is_left, failed) = ahead.finish(work, self.state.lock(), made, supply);
        if is_left {
            self.go_on_closing();
        }
        match failed {
            None => Some(bytes),
            Some(error) => {
                crate::events::debug!(%error, bytes, "memory could not be made ahead");
                Some(0)
            }
        }
    }
}

impl Ahead {
    fn bytes(&self) -> usize {
        self.pages.len() * self.target.page_bytes
    }

    /// Notes the outcome in the books. Returns whether only this thread can go on with the closing
    /// of the range, and why there is no memory if there is none.
    fn finish(
        &self,
        work: AtWork,
        mut state: Locked<'_>,
        made: Result<Made, Failure>,
        supply: Vec<PhysicalMemory>,
    ) -> (bool, Option<VmmError>) {
        let bytes = self.bytes();
        let (chunk, mut failure) = match made {
            Ok(made) => (Some((made.pages, made.mapping)), None),
            Err(mut failure) => (failure.left.still_mapped.pop(), Some(failure)),
        };
        let kept_bytes = chunk.as_ref().map_or(0, |_| bytes);
        // The range cannot have gone: it ends with its last chunk, and one is being filled.
        let mut is_left = false;
        if let Some(mut range) = state.ranges.get(self.owner.range) {
            let pages = &mut range.pages;
            pages.finish_ahead(self.pages.start, chunk, failure.is_none());
            is_left = range.is_left();
        }
        if let Some(failure) = &mut failure {
            state.settle(self.owner, bytes, kept_bytes, &mut failure.left);
            state.restock(supply);
            state.stop_prefetching(self.owner.range);
        }
        drop((work, state));
        (is_left, failure.map(|failure| failure.error))
    }
}

impl State {
    /// The next chunk to make ahead. `None` if no range wants any; `Some(None)` if the one that did
    /// wants none any more, or others may.
    fn next_ahead(&mut self, chunk_bytes_max: usize) -> Option<Option<Ahead>> {
        self.feed_starved();
        self.look_again();
        // A chunk for each range in its turn: several may back the same blocks.
        let mut ranges = (self.ranges).with_in_turn(Fact::Hungry, self.prefetched);
        let Some((id, mut range)) = ranges.find(|(_, range)| range.wants_ahead()) else {
            return self.starved.is_any_told().then_some(None);
        };
        self.prefetched = id;
        let pages = match range.owes() {
            // What it is asked to give back is not made anew.
            true => None,
            false => range.next_ahead(chunk_bytes_max),
        };
        let (Some(pages), Some(target)) = (pages, range.target()) else {
            range.quietly().is_hungry = false;
            return Some(None);
        };
        // No other thread makes pages of it, as that takes the engine's lock.
        Some(Some(Ahead {
            owner: range.owner(id),
            target,
            pages,
        }))
    }

    /// Has ranges that the budget had no room for want memory again, if there is some now: some under
    /// each hold of the lock.
    fn feed_starved(&mut self) {
        let committed_bytes = self.ledger.committed_bytes();
        for id in self.starved.take(committed_bytes, BITE) {
            if let Some(mut range) = self.ranges.get(id) {
                range.quietly().look_ahead();
            }
        }
    }

    fn stop_prefetching(&self, id: RangeId) {
        if let Some(mut range) = self.ranges.get(id) {
            range.quietly().is_hungry = false;
        }
    }
}
