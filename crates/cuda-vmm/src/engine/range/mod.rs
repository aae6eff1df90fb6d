//! One elastic range of an engine: its addresses, its pages, and their users.
//!
//! Everything here happens under the range's lock and calls no driver.

mod ahead;
mod leased;
pub(crate) mod leases;
mod pins;
pub(crate) mod rest;

use super::at_work::AtWork;
use super::books::account::AccountId;
use super::books::chunk_plan::ChunkRules;
use super::books::counters::PoolCounters;
use super::books::hint::Hint;
use super::books::owner::Owner;
use super::books::pages::{Pages, Survey};
use super::books::range_id::RangeId;
use super::books::tally::{Fact, RangeLook};
use super::options::PoolOptions;
use super::owed::Owed;
use super::queue::Until;
use super::target::Target;
use super::users::Users;
use crate::size::Extent;
use crate::sync::Arc;
use crate::{Access, Device, Mapping, Reservation, Result, VmmError};
use core::ops;
use leases::Leases;
use rest::Rest;
use std::collections::{BTreeMap, VecDeque};

#[derive(Debug)]
pub(crate) struct Range {
    /// Its addresses; none when the range has ended.
    pub(crate) reservation: Option<Arc<Reservation>>,
    pub(crate) access: Arc<[(Device, Access)]>,
    pub(crate) pages: Pages<Mapping>,
    pub(crate) account: AccountId,
    pub(crate) users: Users,
    /// Chunks that were freed and are not in the engine's queue yet, and until when they retire.
    pub(crate) freed: VecDeque<(Vec<usize>, Until)>,
    pub(crate) options: PoolOptions,
    /// Where the latest allocation ended, in bytes.
    pub(crate) frontier_bytes: usize,
    /// The pages that allocations will need next, if the owner has said so.
    pub(crate) hint: Option<Arc<Hint>>,
    /// Whether memory is to be made ahead of it.
    pub(crate) is_hungry: bool,
    /// Pages that graphs name, by the number of the pin.
    pub(crate) pins: BTreeMap<u64, ops::Range<usize>>,
    /// What is used outside, whether the owner frees it or not.
    pub(crate) leases: Leases,
    /// Pages in which the owner has freed all bytes, and some are leased.
    leased_pages: usize,
    /// Those of them in shared chunks.
    leased_shared_pages: usize,
    pub(crate) counters: PoolCounters,
    /// What its account owes.
    pub(crate) owed: Arc<Owed>,
    pub(crate) capacity_bytes: usize,
    pub(crate) page_bytes: usize,
    pub(crate) closed: bool,
    /// Whether it is awake.
    pub(crate) rest: Rest,
    /// Whether its account is closed: it gets no more memory.
    pub(crate) is_account_closed: bool,
    /// Whether the thread that closed it is giving back what it has. Steps leave that alone, except
    /// what the driver refused before: two threads that call the driver in turns are slower than
    /// one.
    pub(crate) has_closer: bool,
    /// Allocations for which others are making room on the device now.
    pub(crate) making_room: usize,
}

/// Where bytes are wanted.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place {
    /// At this offset.
    At(usize),
    /// At the lowest unused offset that is a multiple of this.
    FirstFit { alignment: usize },
}

/// Bytes that an allocation has made live.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Taken {
    pub(crate) offset: usize,
    /// Whether the worker has memory to make ahead now.
    pub(crate) is_hungry: bool,
}

impl Range {
    pub(crate) fn new(
        device: &Device,
        reservation: Reservation,
        (capacity_bytes, page_bytes): (usize, usize),
        (account, owed): (AccountId, Arc<Owed>),
        options: PoolOptions,
    ) -> Self {
        Self {
            reservation: Some(Arc::new(reservation)),
            access: [(device.clone(), Access::ReadWrite)].into(),
            pages: Pages::new(page_bytes),
            account,
            users: Users::default(),
            freed: VecDeque::new(),
            options,
            frontier_bytes: 0,
            hint: None,
            is_hungry: options.ahead_bytes_max > 0,
            pins: BTreeMap::new(),
            leases: Leases::default(),
            leased_pages: 0,
            leased_shared_pages: 0,
            counters: PoolCounters::default(),
            owed,
            capacity_bytes,
            page_bytes,
            closed: false,
            rest: Rest::Awake(None),
            is_account_closed: false,
            has_closer: false,
            making_room: 0,
        }
    }

    /// What is needed to map memory there; `None` if the range has ended.
    pub(crate) fn target(&self) -> Option<Target> {
        Some(Target {
            reservation: self.reservation.clone()?,
            access: self.access.clone(),
            page_bytes: self.page_bytes,
        })
    }

    /// The largest chunk in bytes, if the engine says this.
    fn chunk_bytes_max(&self, of_engine: usize) -> usize {
        self.options.chunk_bytes_max.unwrap_or(of_engine)
    }

    /// What the range and its engine say about chunks.
    pub(crate) fn chunk_rules(&self, chunk_bytes_max: usize) -> ChunkRules {
        let chunk_bytes_max = self.chunk_bytes_max(chunk_bytes_max);
        ChunkRules {
            capacity_bytes: self.capacity_bytes,
            page_bytes: self.page_bytes,
            chunk_bytes_max,
            single_handle: self.options.single_handle,
        }
    }

    /// Checks bytes that must all be live, and awake.
    pub(crate) fn live_extent(&self, offset: usize, bytes: usize) -> Result<Extent> {
        self.check_awake()?;
        let extent = Extent::new(offset, bytes, self.capacity_bytes)?;
        if !self.is_live(&extent.range()) {
            return Err(VmmError::NotMapped { offset, bytes });
        }
        Ok(extent)
    }

    /// The bytes that an allocation is about, where `place` says.
    #[inline]
    pub(crate) fn extent_at(&self, place: Place, bytes: usize) -> Result<Extent> {
        let offset = self.offset_of(place, bytes)?;
        Extent::new(offset, bytes, self.capacity_bytes)
    }

    /// The offset that a place stands for.
    fn offset_of(&self, place: Place, bytes: usize) -> Result<usize> {
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

    /// Makes bytes live if all their pages are there and no thread works on them; `None` if that
    /// takes more.
    ///
    /// # Errors
    /// Those that the whole allocation would return.
    #[inline]
    pub(crate) fn take_there(&mut self, place: Place, bytes: usize) -> Result<Option<Taken>> {
        if self.takes_no_more() {
            return Err(VmmError::Closed);
        }
        self.check_awake()?;
        let bytes = self.extent_at(place, bytes)?.range();
        if self.take_within_chunk(&bytes) {
            return Ok(Some(self.taken(&bytes)));
        }
        if !self.pages.is_beyond_chunk(&bytes) {
            return Ok(None);
        }
        let survey = self.pages.survey(&bytes);
        let survey = survey.filter(Survey::is_there);
        Ok(survey.map(|survey| self.take(&bytes, &survey)))
    }

    /// Whether [`take_there`](Self::take_there) would make these bytes live. Not while another
    /// allocation of the range is under way, when it takes nothing within one chunk.
    pub(crate) fn is_there(&self, place: Place, bytes: usize) -> bool {
        let extent = self.extent_at(place, bytes);
        let survey = extent.map(|extent| self.pages.survey(&extent.range()));
        !self.takes_no_more()
            && self.rest.is_awake()
            && !self.pages.is_any_pending()
            && survey.is_ok_and(|it| it.is_some_and(|it| it.is_there()))
    }

    /// Makes bytes live if they lie in one chunk that has other live bytes; `None` if not. To free
    /// them again leaves that chunk as it was.
    pub(crate) fn take_beside_live(&mut self, offset: usize, bytes: usize) -> Option<Taken> {
        let extent = self.extent_at(Place::At(offset), bytes).ok()?;
        let bytes = extent.range();
        let is_taken = !self.takes_no_more()
            && self.rest.is_awake()
            && self.pages.is_within_backed(&bytes)
            && self.take_within_chunk(&bytes);
        is_taken.then(|| self.taken(&bytes))
    }

    /// Makes bytes live if one chunk backs them and no thread works on it; returns whether it did.
    #[inline]
    fn take_within_chunk(&mut self, bytes: &ops::Range<usize>) -> bool {
        match self.waits_for_leases() {
            false => self.pages.take_within_chunk(bytes),
            true => self.with_leased_pages(bytes, |range| range.pages.take_within_chunk(bytes)),
        }
    }

    /// Makes bytes live for which no page is missing.
    pub(crate) fn take(&mut self, bytes: &ops::Range<usize>, survey: &Survey) -> Taken {
        self.with_leased_pages(bytes, |range| range.pages.take(bytes, survey));
        self.taken(bytes)
    }

    /// Notes that an allocation, or a wake, has made these bytes live.
    #[inline]
    pub(crate) fn taken(&mut self, bytes: &ops::Range<usize>) -> Taken {
        let is_awake = self.rest.is_awake();
        self.counters.allocations += u64::from(is_awake);
        Taken {
            offset: bytes.start,
            is_hungry: is_awake && self.advance(bytes.end),
        }
    }

    /// What it is now.
    pub(crate) fn look(&self) -> RangeLook {
        let parts = self.parts();
        let spare_parked_bytes = self.spare_parked_bytes();
        let is_parked = spare_parked_bytes > 0;
        let is_left_parked = is_parked && !self.has_closer;
        let facts = [
            (Fact::Freed, !self.freed.is_empty()),
            (Fact::WaitsForLeases, self.waits_for_leases()),
            (Fact::Closed, self.closed),
            (Fact::Ended, self.closed && self.pages.chunks() == 0),
            (Fact::Ending, self.is_ending()),
            (Fact::Parked, is_parked),
            (Fact::ParkedAndLeft, is_left_parked && self.keeps_nothing()),
            (Fact::Ahead, parts.ahead_bytes > 0),
            (Fact::StaleAhead, self.stale_ahead().is_some()),
            (Fact::Hungry, self.wants_ahead()),
            (Fact::Quarantined, self.pages.is_any_refused()),
            (Fact::UsedByAll, self.users.are_all()),
            (Fact::Leaving, self.leaving().is_some()),
        ];
        RangeLook {
            account: self.account,
            parts,
            spare_parked_bytes,
            left_parked_bytes: if is_left_parked {
                spare_parked_bytes
            } else {
                0
            },
            facts: facts.into_iter().collect(),
        }
    }

    /// Whether it is closed, or its account is.
    #[inline]
    pub(crate) fn takes_no_more(&self) -> bool {
        self.closed || self.is_account_closed
    }

    /// Whether what it has freed is of no use to it: it is closed, or its account is, or it is
    /// asleep.
    pub(crate) fn keeps_nothing(&self) -> bool {
        self.takes_no_more() || !self.rest.is_awake()
    }

    /// Whose its memory is; the range is the one of this name.
    pub(crate) fn owner(&self, range: RangeId) -> Owner {
        let account = self.account;
        Owner { account, range }
    }

    /// Whether the owner of its account is asked for memory.
    pub(crate) fn owes(&self) -> bool {
        self.owed.bytes() > 0
    }

    /// Whether a thread that closes it waits for work on it: not for its own, nor for pages that
    /// wait for others to make room, which may be waiting for the range to close.
    pub(crate) fn is_awaited_by_close(&self) -> bool {
        self.pages.is_worked_on() && self.making_room == 0 && !AtWork::any()
    }

    /// Whether it is closed and no thread is closing it any more.
    pub(crate) fn is_left(&self) -> bool {
        self.closed && !self.has_closer
    }

    /// Ends it. What it is left with is to be dropped without a lock.
    pub(crate) fn end(&mut self) -> Remains {
        Remains {
            account: self.account,
            counters: self.counters,
            _pages: core::mem::replace(&mut self.pages, Pages::new(self.page_bytes)),
            _users: core::mem::take(&mut self.users),
            _freed: core::mem::take(&mut self.freed),
            _leases: core::mem::take(&mut self.leases),
            _rest: core::mem::replace(&mut self.rest, Rest::Awake(None)),
            _reservation: self.reservation.take(),
        }
    }
}

/// What a range that has ended leaves; its addresses go last.
#[derive(Debug)]
pub(crate) struct Remains {
    pub(crate) account: AccountId,
    pub(crate) counters: PoolCounters,
    _pages: Pages<Mapping>,
    _users: Users,
    _freed: VecDeque<(Vec<usize>, Until)>,
    _leases: Leases,
    _rest: Rest,
    _reservation: Option<Arc<Reservation>>,
}
