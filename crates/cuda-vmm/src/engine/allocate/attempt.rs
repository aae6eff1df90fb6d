//! One allocation under the engine's lock: tries, and obstacles that are overcome between them.

use super::obstacle::{Lack, Obstacle};
use crate::engine::at_work::AtWork;
use crate::engine::backing::Supply;
use crate::engine::books::backoff::Backoff;
use crate::engine::books::chunk_plan::ChunkPlan;
use crate::engine::books::ledger::{AccountId, Refusal};
use crate::engine::books::pressure::Ticket;
use crate::engine::changes::Locked;
use crate::engine::handle::RangeHandle;
use crate::engine::inner::Inner;
use crate::engine::range::{Place, Range, Taken};
use crate::engine::relief::Relief;
use crate::engine::shortage::Shortage;
use crate::engine::state::State;
use crate::engine::waiting::{Patience, device_backoff};
use crate::size::Extent;
use crate::sync::Arc;
use crate::{Result, VmmError};

/// An allocation under way, and what was done for it so far.
pub(super) struct Attempt<'a> {
    pub(super) handle: &'a RangeHandle,
    place: Place,
    bytes: usize,
    pub(super) patience: &'a Patience,
    /// Its place in the line, if it stands there.
    pub(super) ticket: Option<Ticket>,
    /// What was done against a shortage of the budget.
    pub(super) shortage: Shortage,
    /// What was done against a shortage of the device.
    pub(super) relief: Relief,
    /// Whether the driver was asked again for quarantined memory at its pages.
    pub(super) has_retried: bool,
    /// Whether the driver was asked again for all that is quarantined.
    pub(super) has_retried_all: bool,
    /// Whether the range's streams were made to wait for what retires at its pages.
    pub(super) has_followed: bool,
    pub(super) backoff: Backoff,
}

/// How one try ends.
pub(super) enum Outcome<'a> {
    /// The bytes are live.
    Done(Taken),
    /// Nothing has changed, because of this.
    Blocked(Obstacle, Locked<'a>),
    /// The budget had room, but the device has no memory. `seen` are the device's memory events
    /// before the try.
    DeviceShort { error: VmmError, seen: u64 },
}

/// What an allocation finds at its pages, and so needs.
pub(super) struct Need {
    pub(super) extent: Extent,
    pub(super) plan: ChunkPlan,
    account: AccountId,
    page_bytes: usize,
}

impl<'a> Attempt<'a> {
    pub(super) fn new(
        handle: &'a RangeHandle,
        place: Place,
        bytes: usize,
        patience: &'a Patience,
    ) -> Self {
        // A call from within this thread's own work would wait for that.
        let patience = match AtWork::any() {
            true => &Patience::None,
            false => patience,
        };
        Self {
            handle,
            place,
            bytes,
            patience,
            ticket: None,
            shortage: Shortage::default(),
            relief: Relief::default(),
            has_retried: false,
            has_retried_all: false,
            has_followed: false,
            backoff: device_backoff(),
        }
    }

    pub(super) fn engine(&self) -> &'a Arc<Inner> {
        self.handle.inner()
    }

    /// Forgets what was done before a wait for the device: it may help anew.
    pub(super) fn begin_again(&mut self) {
        self.relief.begin_again();
        self.shortage.begin_again();
        (self.has_retried, self.has_followed) = (false, false);
    }

    /// What the allocation needs, unless something is in the way at its pages.
    pub(super) fn look(&self, state: &State, range: &Range) -> Result<Need, Obstacle> {
        if range.closed {
            return Err(VmmError::Closed.into());
        }
        let extent = range.extent_at(self.place, self.bytes)?;
        let bytes = extent.range();
        let Some(survey) = range.pages.survey(&bytes) else {
            return Err(match range.is_held_by_lease(&bytes) {
                true => Obstacle::Leased(extent),
                false => Obstacle::already_mapped(extent),
            });
        };
        let (account, page_bytes) = (range.account, range.page_bytes);
        let rules = range.chunk_rules(self.engine().options.chunk_bytes_max);
        let plan = ChunkPlan::new(&range.pages, &extent, survey, &rules);
        let survey = &plan.survey;
        let unused = survey.unused().map(|first| range.pages.chunk_bytes(first));
        let more_bytes = survey.missing_pages() * page_bytes + unused.sum::<usize>();
        let whole_bytes = extent.pages(page_bytes).len() * page_bytes;
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
        // Above a lowered ceiling it may not use what it has freed again, though that is there.
        let above_ceiling = state.room_below_ceiling(range);
        if let Some(refusal) = above_ceiling.filter(|room| more_bytes > room.free_bytes) {
            return Err(Obstacle::Short(Lack {
                account,
                bytes: more_bytes,
                refusal,
                is_above_ceiling: true,
            }));
        }
        if self.must_wait(state, range, &survey.retiring) {
            return Err(Obstacle::Retiring(extent, plan.survey.retiring));
        }
        Ok(Need {
            extent,
            plan,
            account,
            page_bytes,
        })
    }

    /// Whether chunks that retire cannot be used again now.
    fn must_wait(&self, state: &State, range: &Range, retiring: &[usize]) -> bool {
        if retiring.is_empty() {
            return false;
        }
        // If nobody takes steps, or not often, what is past is looked for now and then.
        let is_overgrown = !self.shortage.has_polled() && state.queue.is_overgrown();
        is_overgrown || !state.may_follow(self.handle.id(), range, retiring)
    }
}

impl Need {
    /// Charges the account for it, and takes from the cache what serves it.
    pub(super) fn charge(
        &mut self,
        state: &mut Locked<'_>,
        ticket: Option<Ticket>,
    ) -> Result<Supply, Obstacle> {
        let mut charge =
            |plan: &ChunkPlan| state.charge(self.account, plan, self.page_bytes, ticket);
        let charged = charge(&self.plan).or_else(|refusal| {
            if self.plan.spare_pages == 0 {
                return Err(refusal);
            }
            // What would only be there for later is left out before anything is given up for it.
            self.plan.spare_pages = 0;
            charge(&self.plan)
        });
        charged.map_err(|refusal| self.lack(refusal))
    }

    fn lack(&self, refusal: Refusal) -> Obstacle {
        Obstacle::Short(Lack {
            account: self.account,
            bytes: self.plan.survey.missing_pages() * self.page_bytes,
            refusal,
            is_above_ceiling: false,
        })
    }
}
