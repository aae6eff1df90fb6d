//! All numbers of an engine under one look.

use super::books::counters::{EngineCounters, PoolCounters};
use super::books::ledger::Quota;
use super::books::range_id::RangeId;
use super::inner::Engine;
use super::range::Range;
use super::state::State;
use super::stats::EngineStats;
use crate::MemoryParts;

/// Numbers of one range, taken in one moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RangeStats {
    pub(crate) parts: MemoryParts,
    pub(crate) live_bytes: usize,
    pub(crate) live_pages: usize,
    pub(crate) committed_bytes: usize,
    pub(crate) chunks: usize,
    pub(crate) unused_bytes: usize,
    pub(crate) largest_unused_run_bytes: usize,
    pub(crate) quota: Quota,
    pub(crate) counters: PoolCounters,
}

/// What an engine and its open ranges hold, and what has happened, at one moment.
#[derive(Debug, Default)]
pub(crate) struct Look {
    pub(crate) stats: EngineStats,
    pub(crate) counters: EngineCounters,
    /// Ranges that are not closed.
    pub(crate) ranges: Vec<(RangeId, RangeStats)>,
}

impl Engine {
    /// One look at everything. All zero except the limit in a forked process, where the lock may be
    /// held for good.
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
    pub(crate) fn look(&self) -> Look {
        let (mut counters, mut ranges) = (self.counters, Vec::new());
        let stats = self.stats_seen(|id, range| {
            counters.ranges.add(&range.counters);
            if !range.closed {
                ranges.push((id, self.range_stats(range)));
            }
        });
        Look {
            stats,
            counters,
            ranges,
        }
    }

    /// A range's numbers: what its books say, and what is on its account besides.
    pub(crate) fn range_stats(&self, range: &Range) -> RangeStats {
        let account = Some(range.account);
        let live = range.pages.live();
        let gaps = || live.gaps(0..range.capacity_bytes).map(|gap| gap.len());
        let mut parts = range.parts();
        let unreleased = self.unreleased.iter().filter(|(of, _)| *of == account);
        parts.quarantined_bytes += unreleased.map(|(_, memory)| memory.bytes()).sum::<usize>();
        let releasing = self.releasing.iter().filter(|(of, _)| *of == account);
        parts.retiring_bytes += releasing.map(|(_, bytes)| bytes).sum::<usize>();
        parts.filling_bytes += self.relocations.moving_bytes(account);
        parts.quarantined_bytes += self.relocations.quarantined_bytes(account);
        RangeStats {
            parts,
            live_bytes: range.owned_bytes(),
            live_pages: range.owned_pages(),
            committed_bytes: self.ledger.account_bytes(range.account),
            chunks: range.pages.chunks(),
            unused_bytes: gaps().sum(),
            largest_unused_run_bytes: gaps().max().unwrap_or_default(),
            quota: self.ledger.quota(range.account).unwrap_or_default(),
            counters: range.counters,
        }
    }
}
