//! The state of an engine, and its lock.
//!
//! The lock is taken by [`StateLock::lock`](super::changes), which also tells the threads that wait
//! of each change.

use super::accounts::Accounts;
use super::books::account::AccountId;
use super::books::cache::Cache;
use super::books::counters::EngineCounters;
use super::books::ledger::Ledger;
use super::books::owner::Owner;
use super::books::range_id::RangeId;
use super::books::refusals::Refusals;
use super::books::shared_chunks::SharedChunks;
use super::books::starved::Starved;
use super::books::tally::{Fact, Tally};
use super::listeners::Listeners;
use super::queue::{BITE, Queue};
use super::range::Range;
use super::ranges::Ranges;
use super::relocations::Relocations;
use super::stats::EngineStats;
use crate::sync::atomic::{AtomicBool, AtomicUsize};
use crate::sync::{Apart, Arc, Condvar, Mutex};
use crate::{MemoryParts, PhysicalMemory, Stream};
use core::any::Any;
use std::collections::BTreeMap;

/// The state behind its lock, with what threads read without it.
#[derive(Debug)]
pub(crate) struct StateLock {
    pub(crate) state: Mutex<State>,
    /// Signalled when something has changed.
    pub(crate) changed: Condvar,
    /// Threads that wait for `changed`, and listeners. All threads that free memory read it without
    /// the lock, and it changes seldom.
    pub(crate) waiting: Apart<AtomicUsize>,
    /// Tasks that wait for a change; each counts in `waiting`.
    pub(crate) listeners: Listeners,
    /// Whether any account owes memory, or wants more than there is. Read as `waiting` is.
    pub(crate) is_pressing: Apart<AtomicBool>,
}

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) ledger: Ledger,
    pub(crate) accounts: Accounts,
    /// What each account owes that owes anything, in bytes.
    pub(crate) owing: BTreeMap<AccountId, usize>,
    /// What has happened, except what ranges that are there count themselves.
    pub(crate) counters: EngineCounters,
    pub(crate) ranges: Ranges,
    pub(crate) next_pin: u64,
    /// The range that memory was last made ahead for.
    pub(crate) prefetched: RangeId,
    /// Ranges that the budget had no room for, until there is some.
    pub(crate) starved: Starved,
    pub(crate) queue: Queue,
    pub(crate) cache: Cache<PhysicalMemory>,
    /// Chunks that several ranges map.
    pub(crate) shared: SharedChunks<Arc<PhysicalMemory>>,
    /// Where memory is overwritten before it goes to the cache; made when it is first needed.
    pub(crate) scrubbing: Option<Stream>,
    /// Memory that is mapped nowhere but that the driver would not release, and whose it is; the
    /// cache's is no account's.
    pub(crate) unreleased: Vec<(Option<Owner>, PhysicalMemory)>,
    /// Bytes of it that are being released now, by a thread that has taken them out.
    pub(crate) releasing: Vec<(Option<Owner>, usize)>,
    /// Chunks that are being moved, and what that has left.
    pub(crate) relocations: Relocations,
    /// When what the driver refused is tried again.
    pub(crate) refusals: Refusals,
    /// Ranges that are gone from `ranges` and whose addresses are being freed now.
    pub(crate) ending: Vec<RangeId>,
    /// The engine itself, while closed ranges are left of which memory was leased: it may have no
    /// other owner. Without a worker, a step finds that the leases are over, or another engine of
    /// the device does when it is short of memory.
    pub(crate) kept: Option<Arc<dyn Any + Send + Sync>>,
}

impl StateLock {
    /// A state without ranges, for a budget in bytes.
    pub(crate) fn new(budget_bytes: usize) -> Self {
        Self {
            state: Mutex::new(State::new(budget_bytes)),
            changed: Condvar::new(),
            waiting: Apart::default(),
            listeners: Listeners::default(),
            is_pressing: Apart::default(),
        }
    }
}

impl State {
    fn new(budget_bytes: usize) -> Self {
        Self {
            ledger: Ledger::new(budget_bytes),
            accounts: Accounts::default(),
            owing: BTreeMap::new(),
            counters: EngineCounters::default(),
            ranges: Ranges::default(),
            next_pin: 0,
            prefetched: RangeId(0),
            starved: Starved::default(),
            queue: Queue::default(),
            cache: Cache::default(),
            shared: SharedChunks::default(),
            scrubbing: None,
            unreleased: Vec::new(),
            releasing: Vec::new(),
            relocations: Relocations::default(),
            refusals: Refusals::default(),
            ending: Vec::new(),
            kept: None,
        }
    }

    /// Looks at the ranges that were changed since the last look; returns what all were. The caller
    /// has locked no range.
    pub(crate) fn look_again(&mut self) -> &Tally {
        let Self {
            ranges,
            ledger,
            shared,
            ..
        } = self;
        ranges.look_again(|account, comes_back| ledger.foresee(account, comes_back));
        for account in shared.take_changed() {
            let coming_bytes = shared.of_account(account).retiring_bytes;
            ledger.foresee_shared(account, coming_bytes);
        }
        ranges.tally()
    }

    /// Whether the driver has refused to take anything back.
    pub(crate) fn is_any_refused(&mut self) -> bool {
        self.parts().quarantined_bytes > 0 || self.ranges.tally().any(Fact::Quarantined)
    }

    /// Puts chunks that were freed under their range's lock into the queue, at most [`BITE`];
    /// returns how many.
    pub(crate) fn collect_freed(&mut self) -> usize {
        self.look_again();
        let Self {
            ranges,
            queue,
            shared,
            ..
        } = self;
        let mut room = BITE;
        for (id, mut range) in ranges.with(Fact::Freed) {
            room = Self::collect_of(queue, shared, (id, range.quietly()), room);
            if room == 0 {
                break;
            }
        }
        BITE - room
    }

    /// Puts chunks of one range into the queue, at most `room`; returns how many more it could
    /// take.
    pub(crate) fn collect_of(
        queue: &mut Queue,
        shared: &mut SharedChunks<Arc<PhysicalMemory>>,
        (id, range): (RangeId, &mut Range),
        room: usize,
    ) -> usize {
        if range.pages.any_shared() {
            let freed = range.freed.iter().flat_map(|(chunks, _)| chunks).take(room);
            let unpinned = freed.filter(|first| !range.is_chunk_pinned(**first));
            unpinned.for_each(|first| shared.retire((id, *first)));
        }
        queue.collect(id, &mut range.freed, room)
    }

    /// What is committed, by what it is. The caller has locked no range.
    pub(crate) fn parts(&mut self) -> MemoryParts {
        self.look_again().parts() + self.parts_of_none()
    }

    /// What is committed and is in no range's books.
    fn parts_of_none(&self) -> MemoryParts {
        let unreleased = self.unreleased.iter().map(|(_, memory)| memory.bytes());
        MemoryParts {
            filling_bytes: self.relocations.moving_bytes(|_| true),
            retiring_bytes: self.releasing.iter().map(|(_, bytes)| bytes).sum(),
            cached_bytes: self.cache.bytes(),
            quarantined_bytes: unreleased.sum::<usize>()
                + self.relocations.quarantined_bytes(|_| true),
            ..MemoryParts::default()
        } + self.shared.parts()
    }

    /// The numbers, and a look at each range in the same moment: a range's memory may change from
    /// one part to another under the range's lock alone.
    pub(crate) fn stats_seen(&self, mut see: impl FnMut(RangeId, &Range)) -> EngineStats {
        let mut parts = self.parts_of_none();
        let mut stats = EngineStats::default();
        for (id, range) in self.ranges.iter() {
            see(id, &range);
            parts += range.parts();
            stats.chunks += range.pages.chunks();
            let rest = range.rest.stats();
            stats.asleep_bytes += rest.asleep_bytes;
            stats.host_bytes += rest.host_bytes;
        }
        EngineStats {
            committed_bytes: self.ledger.committed_bytes(),
            parts,
            ranges: self.ranges.len(),
            ..stats
        }
    }

    /// Notes that a thread has taken out memory that it releases.
    pub(crate) fn begin_releasing(&mut self, owner: Option<Owner>, bytes: usize) {
        self.releasing.push((owner, bytes));
        if let Some(owner) = owner {
            self.ledger.begin_releasing(owner.account, bytes);
        }
    }

    /// Notes that the thread is done with it.
    pub(crate) fn end_releasing(&mut self, owner: Option<Owner>, bytes: usize) {
        let mut releasing = self.releasing.iter();
        let Some(at) = releasing.position(|held| *held == (owner, bytes)) else {
            return;
        };
        self.releasing.swap_remove(at);
        if let Some(owner) = owner {
            self.ledger.end_releasing(owner.account, bytes);
        }
    }
}
