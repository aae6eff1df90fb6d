//! Numbers of an engine, taken in one moment.

use crate::size::Readable;
use core::fmt;

/// Memory by what it is, in bytes. Every charged byte is in exactly one part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
#[non_exhaustive]
pub struct MemoryParts {
    /// Pages with live bytes.
    pub live_bytes: usize,
    /// Pages whose bytes were all freed, and some of which are leased.
    pub leased_bytes: usize,
    /// Pages without live bytes in chunks that have others.
    pub slack_bytes: usize,
    /// Being made.
    pub filling_bytes: usize,
    /// Freed, but the device may still use it, or it is being unmapped.
    pub retiring_bytes: usize,
    /// Freed and still mapped.
    pub parked_bytes: usize,
    /// Made before anyone asked for it.
    pub ahead_bytes: usize,
    /// Clean and mapped nowhere; on no range's account.
    pub cached_bytes: usize,
    /// Refused by the driver when it was to be given back.
    pub quarantined_bytes: usize,
}

impl MemoryParts {
    /// All of it, in bytes.
    pub fn committed_bytes(&self) -> usize {
        self.named().iter().map(|(_, bytes)| bytes).sum()
    }

    /// The parts by name.
    pub(crate) fn named(&self) -> [(&'static str, usize); 9] {
        [
            ("live", self.live_bytes),
            ("leased", self.leased_bytes),
            ("slack", self.slack_bytes),
            ("filling", self.filling_bytes),
            ("retiring", self.retiring_bytes),
            ("parked", self.parked_bytes),
            ("ahead", self.ahead_bytes),
            ("cached", self.cached_bytes),
            ("quarantined", self.quarantined_bytes),
        ]
    }

    /// What is left when some of it is looked at apart.
    pub(crate) fn without(&self, some: &Self) -> Self {
        Self {
            live_bytes: self.live_bytes.saturating_sub(some.live_bytes),
            leased_bytes: self.leased_bytes.saturating_sub(some.leased_bytes),
            slack_bytes: self.slack_bytes.saturating_sub(some.slack_bytes),
            filling_bytes: self.filling_bytes.saturating_sub(some.filling_bytes),
            retiring_bytes: self.retiring_bytes.saturating_sub(some.retiring_bytes),
            parked_bytes: self.parked_bytes.saturating_sub(some.parked_bytes),
            ahead_bytes: self.ahead_bytes.saturating_sub(some.ahead_bytes),
            cached_bytes: self.cached_bytes.saturating_sub(some.cached_bytes),
            quarantined_bytes: (self.quarantined_bytes).saturating_sub(some.quarantined_bytes),
        }
    }
}

/// What an engine holds. The parts add up to [`committed_bytes`](Self::committed_bytes) in every snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
#[non_exhaustive]
pub struct EngineStats {
    /// The budget in bytes.
    pub limit_bytes: usize,
    /// What the device really holds for this engine, in bytes.
    pub committed_bytes: usize,
    /// Pages with live bytes.
    pub live_bytes: usize,
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
    /// Clean and mapped nowhere, to be mapped again; on no range's account.
    pub cached_bytes: usize,
    /// Refused by the driver when it was to be given back, or mapped again by
    /// [`compact`](crate::VirtualMemoryPool::compact); retried.
    pub quarantined_bytes: usize,
    /// Ranges, those included that are closing.
    pub ranges: usize,
    /// Mappings.
    pub chunks: usize,
}

impl EngineStats {
    /// The sum of the parts, which is `committed_bytes`.
    pub fn parts_bytes(&self) -> usize {
        self.parts().committed_bytes()
    }

    /// The parts alone.
    pub fn parts(&self) -> MemoryParts {
        MemoryParts {
            live_bytes: self.live_bytes,
            leased_bytes: self.leased_bytes,
            slack_bytes: self.slack_bytes,
            filling_bytes: self.filling_bytes,
            retiring_bytes: self.retiring_bytes,
            parked_bytes: self.parked_bytes,
            ahead_bytes: self.ahead_bytes,
            cached_bytes: self.cached_bytes,
            quarantined_bytes: self.quarantined_bytes,
        }
    }
}

impl EngineStats {
    /// What could be given up, or be made so by compaction, in bytes.
    pub(super) fn reclaimable_bytes(&self) -> usize {
        self.parked_bytes + self.ahead_bytes + self.cached_bytes + self.slack_bytes
    }
}

impl fmt::Display for EngineStats {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{} committed of {}: {} live, {} leased, {} slack, {} filling, {} retiring, {} parked, {} ahead, {} cached, {} quarantined; \
             {} ranges, {} mappings",
            Readable(self.committed_bytes),
            Readable(self.limit_bytes),
            Readable(self.live_bytes),
            Readable(self.leased_bytes),
            Readable(self.slack_bytes),
            Readable(self.filling_bytes),
            Readable(self.retiring_bytes),
            Readable(self.parked_bytes),
            Readable(self.ahead_bytes),
            Readable(self.cached_bytes),
            Readable(self.quarantined_bytes),
            self.ranges,
            self.chunks,
        )
    }
}

/// What one step of an engine did, and what is left to do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
#[non_exhaustive]
pub struct StepReport {
    /// Bytes that the device was seen to have finished with.
    pub retired_bytes: usize,
    /// Bytes given back to the driver or to the cache.
    pub drained_bytes: usize,
    /// Bytes made ahead.
    pub prefetched_bytes: usize,
    /// Bytes that the device may still use.
    pub retiring_bytes: usize,
    /// Bytes that the driver refused to take back.
    pub quarantined_bytes: usize,
}
