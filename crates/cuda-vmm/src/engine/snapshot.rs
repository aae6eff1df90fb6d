//! All numbers of an engine under one look.

use super::books::account::{AccountId, Quota};
use super::books::counters::{EngineCounters, PoolCounters};
use super::books::owner::Owner;
use super::books::range_id::RangeId;
use super::inner::Engine;
use super::range::Range;
use super::range::rest::RestStats;
use super::state::State;
use super::stats::{AccountStats, EngineStats};
use crate::MemoryParts;
use crate::sync::Arc;

/// One range's numbers, and the counts that walk its books.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RangeStats {
    /// Nothing of it is cached.
    pub(crate) parts: MemoryParts,
    pub(crate) live_bytes: usize,
    pub(crate) live_pages: usize,
    pub(crate) chunks: usize,
    /// What it maps of shared chunks, which are in none of its parts.
    pub(crate) shared_bytes: usize,
    pub(crate) unused_bytes: usize,
    pub(crate) largest_unused_run_bytes: usize,
    pub(crate) rest: RestStats,
    pub(crate) counters: PoolCounters,
}

/// One account's numbers.
#[derive(Debug, Clone)]
pub(crate) struct AccountLook {
    pub(crate) name: Arc<str>,
    pub(crate) quota: Quota,
    pub(crate) owed_bytes: usize,
    pub(crate) stats: AccountStats,
    pub(crate) counters: PoolCounters,
}

/// An engine's numbers at one moment.
#[derive(Debug, Default)]
pub(crate) struct Look {
    pub(crate) stats: EngineStats,
    pub(crate) counters: EngineCounters,
    /// The open accounts, in the order in which they were opened.
    pub(crate) accounts: Vec<AccountLook>,
}

impl Engine {
    /// All of its numbers at one moment; all zero except the limit in a forked process.
    pub(crate) fn look(&self) -> Look {
        let mut look = match self.open() {
            Ok(inner) => inner.state.lock().look(),
            Err(_) => Look::default(),
        };
        look.stats.limit_bytes = self.limit_bytes();
        look.counters.device_calls = self.device().memory_calls();
        look
    }
}

impl State {
    /// All numbers at one moment.
    pub(crate) fn look(&self) -> Look {
        let mut counters = self.counters;
        let accounts = self.accounts.iter();
        let mut accounts: Vec<_> = accounts
            .map(|(id, entry)| {
                let look = AccountLook {
                    name: entry.name.clone(),
                    quota: self.ledger.quota(id).unwrap_or_default(),
                    owed_bytes: entry.owed.bytes(),
                    stats: self.stats_without_ranges(id),
                    counters: entry.counters,
                };
                (id, look)
            })
            .collect();
        let stats = self.stats_seen(|_, range| {
            counters.ranges.add(&range.counters);
            let of = |(id, _): &(AccountId, AccountLook)| *id;
            if let Ok(at) = accounts.binary_search_by_key(&range.account, of) {
                let account = &mut accounts[at].1;
                account.stats.add(range);
                account.counters.add(&range.counters);
            }
        });
        Look {
            stats,
            counters,
            accounts: accounts.into_iter().map(|(_, look)| look).collect(),
        }
    }

    /// One account's numbers; all zero if it is closed.
    pub(crate) fn account_stats(&mut self, id: AccountId) -> AccountStats {
        if !self.accounts.is_open(id) {
            return AccountStats::default();
        }
        let mut stats = self.stats_without_ranges(id);
        self.look_again();
        let ranges = self.ranges.of_account(id);
        ranges.for_each(|slot| stats.add(&slot.lock()));
        stats
    }

    fn stats_without_ranges(&self, id: AccountId) -> AccountStats {
        AccountStats {
            committed_bytes: self.ledger.account_bytes(id),
            parts: self.parts_without_range(|owner| owner.account == id)
                + self.shared.of_account(id),
            ..AccountStats::default()
        }
    }

    /// A range's numbers: what its books say, and what is held for it besides.
    pub(crate) fn range_stats(&self, id: RangeId, range: &Range) -> RangeStats {
        let live = range.pages.live();
        let gaps = || live.gaps(0..range.capacity_bytes).map(|gap| gap.len());
        RangeStats {
            parts: range.parts() + self.parts_without_range(|owner| owner.range == id),
            live_bytes: range.owned_bytes(),
            live_pages: range.owned_pages(),
            chunks: range.pages.chunks(),
            shared_bytes: range.pages.shared_pages() * range.page_bytes,
            unused_bytes: gaps().sum(),
            largest_unused_run_bytes: gaps().max().unwrap_or_default(),
            rest: range.rest.stats(),
            counters: range.counters,
        }
    }

    /// What is held of the owners that are meant and is in no range's books, except shared chunks:
    /// what the driver would not release, what is being released, and what moves.
    fn parts_without_range(&self, is_meant: impl Fn(&Owner) -> bool) -> MemoryParts {
        let meant = |owner: &Option<Owner>| owner.as_ref().is_some_and(&is_meant);
        let unreleased = self.unreleased.iter().filter(|(owner, _)| meant(owner));
        let unreleased_bytes: usize = unreleased.map(|(_, memory)| memory.bytes()).sum();
        let releasing = self.releasing.iter().filter(|(owner, _)| meant(owner));
        MemoryParts {
            filling_bytes: self.relocations.moving_bytes(&is_meant),
            retiring_bytes: releasing.map(|(_, bytes)| bytes).sum(),
            quarantined_bytes: unreleased_bytes + self.relocations.quarantined_bytes(&is_meant),
            ..MemoryParts::default()
        }
    }
}

impl AccountStats {
    /// Adds one of the account's ranges.
    fn add(&mut self, range: &Range) {
        self.parts += range.parts();
        self.chunks += range.pages.chunks();
        let rest = range.rest.stats();
        self.asleep_bytes += rest.asleep_bytes;
        self.host_bytes += rest.host_bytes;
        if !range.closed {
            self.ranges += 1;
            self.capacity_bytes += range.capacity_bytes;
            self.live_bytes += range.owned_bytes();
        }
    }
}
