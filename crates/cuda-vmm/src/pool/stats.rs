//! The numbers of one pool at one moment.

use crate::MemoryParts;
use crate::engine::{RangeStats, write_rest};
use crate::memory_parts::Level;
use crate::size::Readable;
use core::fmt;

/// The memory that a pool holds, and the use of its addresses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
#[non_exhaustive]
pub struct PoolStats {
    /// The size of the pool's addresses in bytes.
    pub capacity_bytes: usize,
    /// The page size in bytes.
    pub page_bytes: usize,
    /// Bytes that were allocated and not freed.
    pub live_bytes: usize,
    /// Pages with live bytes.
    pub live_pages: usize,
    /// The memory that the device holds for the pool, in bytes.
    pub committed_bytes: usize,
    /// The same memory by parts. Nothing of it is cached or shared.
    pub parts: MemoryParts,
    /// What it maps of chunks that other pools map too, in bytes. The account holds them once, so
    /// they are not among [`committed_bytes`](Self::committed_bytes).
    pub shared_bytes: usize,
    /// The number of mappings.
    pub chunks: usize,
    /// Bytes of addresses that are not live.
    pub unused_bytes: usize,
    /// The longest run of addresses that are not live, in bytes.
    pub largest_unused_run_bytes: usize,
    /// Memory that the pool gave up to sleep, and has when it wakes, in bytes. Nothing of it is
    /// committed.
    pub asleep_bytes: usize,
    /// Memory of host stores with contents of the pool, in bytes.
    pub host_bytes: usize,
}

impl PoolStats {
    pub(super) fn new(capacity_bytes: usize, page_bytes: usize, range: RangeStats) -> Self {
        Self {
            capacity_bytes,
            page_bytes,
            live_bytes: range.live_bytes,
            live_pages: range.live_pages,
            committed_bytes: range.parts.total_bytes(),
            parts: range.parts,
            shared_bytes: range.shared_bytes,
            chunks: range.chunks,
            unused_bytes: range.unused_bytes,
            largest_unused_run_bytes: range.largest_unused_run_bytes,
            asleep_bytes: range.rest.asleep_bytes,
            host_bytes: range.rest.host_bytes,
        }
    }
}

impl fmt::Display for PoolStats {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{} live in {} pages of {} over {} of addresses; {} committed: ",
            Readable(self.live_bytes),
            self.live_pages,
            Readable(self.page_bytes),
            Readable(self.capacity_bytes),
            Readable(self.committed_bytes),
        )?;
        // Live pages are written above.
        let parts = MemoryParts::LIST.iter().skip(1);
        self.parts
            .write(formatter, parts.filter(|part| part.level == Level::Range))?;
        if self.shared_bytes > 0 {
            let bytes = Readable(self.shared_bytes);
            write!(formatter, "; {bytes} shared with others")?;
        }
        write_rest(formatter, self.asleep_bytes, self.host_bytes)
    }
}
