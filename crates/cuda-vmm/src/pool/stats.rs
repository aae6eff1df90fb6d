//! Numbers of one pool, taken in one moment.

use crate::engine::{MemoryParts, RangeStats};
use crate::size::Readable;
use core::fmt;

/// What a pool holds, and how its addresses are used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
#[non_exhaustive]
pub struct PoolStats {
    /// Addresses in bytes.
    pub capacity_bytes: usize,
    /// The page in bytes.
    pub page_bytes: usize,
    /// Bytes that were asked for and not given back.
    pub live_bytes: usize,
    /// Pages with live bytes.
    pub live_pages: usize,
    /// Those pages in bytes.
    pub live_page_bytes: usize,
    /// What the device really holds for the pool, in bytes: the sum of `live_page_bytes` and the parts below.
    pub committed_bytes: usize,
    /// Pages whose bytes were all freed, and some of which are leased; see
    /// [`VirtualMemoryPool::lease`](crate::VirtualMemoryPool::lease).
    pub leased_bytes: usize,
    /// Pages without live bytes in chunks that have others.
    pub slack_bytes: usize,
    /// Being made.
    pub filling_bytes: usize,
    /// Freed, but the device may still use it, or it is being unmapped.
    pub retiring_bytes: usize,
    /// Freed and still mapped, to be taken back without a driver call.
    pub parked_bytes: usize,
    /// Made before anyone asked for it, and given up first.
    pub ahead_bytes: usize,
    /// Refused by the driver when it was to be given back, or mapped again by
    /// [`compact`](crate::VirtualMemoryPool::compact); retried.
    pub quarantined_bytes: usize,
    /// Mappings.
    pub chunks: usize,
    /// Bytes of addresses that are not live.
    pub unused_bytes: usize,
    /// The longest run of them.
    pub largest_unused_run_bytes: usize,
}

impl PoolStats {
    pub(super) fn new(capacity_bytes: usize, page_bytes: usize, range: RangeStats) -> Self {
        Self {
            capacity_bytes,
            page_bytes,
            live_bytes: range.live_bytes,
            live_pages: range.live_pages,
            live_page_bytes: range.parts.live_bytes,
            committed_bytes: range.committed_bytes,
            leased_bytes: range.parts.leased_bytes,
            slack_bytes: range.parts.slack_bytes,
            filling_bytes: range.parts.filling_bytes,
            retiring_bytes: range.parts.retiring_bytes,
            parked_bytes: range.parts.parked_bytes,
            ahead_bytes: range.parts.ahead_bytes,
            quarantined_bytes: range.parts.quarantined_bytes,
            chunks: range.chunks,
            unused_bytes: range.unused_bytes,
            largest_unused_run_bytes: range.largest_unused_run_bytes,
        }
    }
}

impl PoolStats {
    /// The parts alone, in whole pages.
    pub fn parts(&self) -> MemoryParts {
        MemoryParts {
            live_bytes: self.live_page_bytes,
            leased_bytes: self.leased_bytes,
            slack_bytes: self.slack_bytes,
            filling_bytes: self.filling_bytes,
            retiring_bytes: self.retiring_bytes,
            parked_bytes: self.parked_bytes,
            ahead_bytes: self.ahead_bytes,
            cached_bytes: 0,
            quarantined_bytes: self.quarantined_bytes,
        }
    }
}

impl fmt::Display for PoolStats {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{} live in {} pages of {} over {} of addresses; {} committed: {} leased, {} slack, {} filling, {} retiring, \
             {} parked, {} ahead, {} quarantined",
            Readable(self.live_bytes),
            self.live_pages,
            Readable(self.page_bytes),
            Readable(self.capacity_bytes),
            Readable(self.committed_bytes),
            Readable(self.leased_bytes),
            Readable(self.slack_bytes),
            Readable(self.filling_bytes),
            Readable(self.retiring_bytes),
            Readable(self.parked_bytes),
            Readable(self.ahead_bytes),
            Readable(self.quarantined_bytes),
        )
    }
}
