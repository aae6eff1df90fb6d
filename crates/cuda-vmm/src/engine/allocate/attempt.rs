//! One allocation under the engine's lock: tries, and obstacles that are overcome between them.

use super::ask::Ask;
use super::need::{Need, Needs, without};
use super::obstacle::{Lack, Obstacle};
use crate::engine::at_work::AtWork;
use crate::engine::books::backoff::Backoff;
use crate::engine::books::chunk_plan::ChunkPlan;
use crate::engine::books::ledger::Refusal;
use crate::engine::books::pressure::Ticket;
use crate::engine::books::range_id::RangeId;
use crate::engine::changes::Locked;
use crate::engine::handle::RangeHandle;
use crate::engine::inner::Inner;
use crate::engine::queue::BITE;
use crate::engine::range::{Place, Range, Taken};
use crate::engine::relief::Relief;
use crate::engine::shortage::Shortage;
use crate::engine::slot::RangeLock;
use crate::engine::state::State;
use crate::engine::waiting::{Patience, device_backoff};
use crate::sync::Arc;
use crate::{Result, VmmError};
use std::collections::BTreeSet;

/// An allocation under way, and what was done for it so far.
pub(super) struct Attempt<'a> {
    pub(super) asks: &'a [Ask<'a>],
    /// The ask that was looked at last.
    at: usize,
    pub(super) patience: &'a Patience,
    /// Its place in the line, if it stands there.
    pub(super) ticket: Option<Ticket>,
    /// Whether it ended where a thread would wait.
    pub(super) would_wait: bool,
    /// What was done against a shortage of the budget.
    pub(super) shortage: Shortage,
    /// What was done against a shortage of the device.
    pub(super) relief: Relief,
    /// The pieces for which the driver was asked again for quarantined memory.
    pub(super) retried: BTreeSet<Piece>,
    /// Whether the driver was asked again for all that is quarantined.
    pub(super) has_retried_all: bool,
    /// The pieces for which their range's streams were made to wait for what retires there.
    pub(super) followed: BTreeSet<Piece>,
    pub(super) backoff: Backoff,
}

/// A piece of an allocation: its range, and its offset there.
pub(super) type Piece = (RangeId, usize);

/// How one try ends.
pub(super) enum Outcome<'a> {
    /// The bytes are live.
    Done(Taken),
    /// Nothing has changed, because of this.
    Blocked(Obstacle, Locked<'a>),
    /// Nothing has changed, because another thread changed what was found.
    Again(Locked<'a>),
    /// The budget had room, but the device has no memory. `seen` are the device's memory events
    /// before the try.
    DeviceShort { error: VmmError, seen: u64 },
}

impl<'a> Attempt<'a> {
    pub(super) fn new(asks: &'a [Ask<'a>], patience: &'a Patience) -> Self {
        let patience = match patience {
            // It does not wait in this thread.
            Patience::Poll => patience,
            // A call from within this thread's own work would wait for that.
            _ if AtWork::any() => &Patience::None,
            _ => patience,
        };
        Self {
            asks,
            at: 0,
            patience,
            ticket: None,
            would_wait: false,
            shortage: Shortage::default(),
            relief: Relief::default(),
            retried: BTreeSet::new(),
            has_retried_all: false,
            followed: BTreeSet::new(),
            backoff: device_backoff(),
        }
    }

    /// The range that was looked at last.
    pub(super) fn handle(&self) -> &'a RangeHandle {
        self.asks[self.at].handle
    }

    pub(super) fn engine(&self) -> &'a Arc<Inner> {
        self.asks[0].handle.inner()
    }

    /// Forgets what was done before a wait for the device: it may help anew.
    pub(super) fn begin_again(&mut self) {
        self.relief.begin_again();
        self.shortage.begin_again();
        self.retried.clear();
        self.followed.clear();
    }

    /// What the allocation needs, unless something is in the way at its pages. With one ask, also
    /// the lock of its range, so that nothing changes there.
    pub(super) fn look_at_all(
        &mut self,
        state: &mut Locked<'a>,
    ) -> Result<(Needs, Option<RangeLock<'a>>), Obstacle> {
        let account = self.asks[0].account();
        let over = state.quietly().room_when_over(account);
        let whole_bytes = self.whole_bytes();
        let mut left: usize = self.asks.iter().map(|ask| ask.places.len()).sum();
        let mut needs = Needs::new(account, left);
        let mut held = None;
        for (at, ask) in self.asks.iter().enumerate() {
            self.at = at;
            // Before the next one is locked.
            drop(held.take());
            let slot = &ask.handle.slot;
            let mut range = slot.lock();
            if !range.freed.is_empty() {
                let State { queue, shared, .. } = state.quietly();
                State::collect_of(queue, shared, (slot.id(), &mut range), BITE);
            }
            if !range.freed.is_empty() {
                return Err(Obstacle::Backlog);
            }
            for (place, bytes) in ask.places {
                left -= 1;
                // Judged by all pieces together, so at the last one.
                let over = over.filter(|_| left == 0);
                let terms = (over, whole_bytes);
                self.look(state, &range, (*place, *bytes), terms, &mut needs)?;
            }
            held = Some(range);
        }
        Ok((needs, held.filter(|_| self.asks.len() == 1)))
    }

    /// Adds what one piece of the allocation needs, unless something is in the way at its pages.
    fn look(
        &self,
        state: &State,
        range: &Range,
        (place, bytes): (Place, usize),
        (over, whole_bytes): (Option<Refusal>, Option<usize>),
        needs: &mut Needs,
    ) -> Result<(), Obstacle> {
        if range.takes_no_more() {
            return Err(VmmError::Closed.into());
        }
        if !self.asks[self.at].wakes {
            range.check_awake()?;
        }
        let extent = range.extent_at(place, bytes)?;
        let bytes = extent.range();
        let Some(survey) = range.pages.survey(&bytes) else {
            return Err(match range.is_held_by_lease(&bytes) {
                true => Obstacle::Leased(extent),
                false => Obstacle::already_mapped(extent),
            });
        };
        let (account, page_bytes) = (range.account, range.page_bytes);
        let rules = range.chunk_rules(self.engine().options.chunk_bytes_max);
        let claimed_end = needs.claimed_end(self.at);
        let survey = without(survey, claimed_end);
        let plan = ChunkPlan::new(&range.pages, &extent, survey, &rules);
        let survey = &plan.survey;
        // A chunk that begins before `claimed_end` was counted with the piece before.
        let unused = survey.unused().filter(|first| *first >= claimed_end);
        let unused = unused.map(|first| range.pages.chunk_bytes(first));
        let piece_bytes = survey.missing_pages() * page_bytes + unused.sum::<usize>();
        let more_bytes = needs.more_bytes + piece_bytes;
        let own_bytes = extent.pages(page_bytes).len() * page_bytes;
        let whole_bytes = whole_bytes.unwrap_or(own_bytes);
        if more_bytes > 0 && whole_bytes > state.ledger.account_limit_bytes(account) {
            // Though a part of it may be there, it never is all at once.
            let room = state.ledger.room(account, self.ticket);
            return Err(Obstacle::TooLarge { whole_bytes, room });
        }
        if survey.quarantined {
            return Err(Obstacle::Quarantined(extent, page_bytes));
        }
        if survey.busy {
            return Err(Obstacle::Busy(extent));
        }
        let mut leaving = survey.leaving.iter();
        if survey.shared || leaving.any(|first| range.is_chunk_pinned(*first)) {
            return Err(Obstacle::shared(extent));
        }
        if !survey.leaving.is_empty() {
            return Err(Obstacle::Leaving(extent));
        }
        // If more is held than a lowered ceiling or limit allows, it may not use what it has freed
        // again, though that is there.
        if let Some(refusal) = over.filter(|room| more_bytes > room.free_bytes) {
            return Err(Obstacle::Short(Lack {
                account,
                bytes: more_bytes,
                refusal,
                is_over: true,
            }));
        }
        if self.must_wait(state, range, &survey.retiring) {
            return Err(Obstacle::Retiring(extent, plan.survey.retiring));
        }
        let need = Need::new(self.at, extent, plan, range, claimed_end)?;
        needs.push(need, piece_bytes);
        Ok(())
    }

    /// All pages of an allocation of several pieces, in bytes.
    fn whole_bytes(&self) -> Option<usize> {
        if let [Ask { places: [_], .. }] = self.asks {
            return None;
        }
        let of_ask = |ask: &Ask<'_>| {
            let page_bytes = ask.handle.page_bytes();
            let (mut pages, mut counted_end) = (0, 0);
            for (place, bytes) in ask.places {
                if let Place::At(offset) = place {
                    let end = offset.saturating_add(*bytes).div_ceil(page_bytes);
                    let start = (offset / page_bytes).max(counted_end);
                    pages += end.saturating_sub(start);
                    counted_end = end.max(counted_end);
                }
            }
            pages.saturating_mul(page_bytes)
        };
        let asks = self.asks.iter().map(of_ask);
        Some(asks.fold(0, usize::saturating_add))
    }

    /// Whether chunks that retire cannot be used again now.
    fn must_wait(&self, state: &State, range: &Range, retiring: &[usize]) -> bool {
        if retiring.is_empty() {
            return false;
        }
        // If no thread takes steps, an allocation looks now and then for fences that are past.
        let is_overgrown = !self.shortage.has_polled()
            && state.queue.is_overgrown()
            && !self.engine().worker.is_there();
        is_overgrown || !state.may_follow(self.handle().id(), range, retiring)
    }
}
