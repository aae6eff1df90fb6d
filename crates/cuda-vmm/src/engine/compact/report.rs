//! What a compaction did.

use crate::size::Readable;
use core::fmt;

/// What [`compact`](crate::VirtualMemoryPool::compact) did, or would do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
#[non_exhaustive]
pub struct CompactReport {
    /// Bytes of live pages that were copied to other memory.
    pub moved_bytes: usize,
    /// Bytes given back to the budget.
    pub returned_bytes: usize,
    /// Slack that is left, in bytes: the budget has no room for the move, a capture is under way,
    /// or another thread is taking bytes there.
    pub skipped_bytes: usize,
    /// Mappings of the pool before.
    pub chunks_before: usize,
    /// Mappings of the pool after.
    pub chunks_after: usize,
}

impl fmt::Display for CompactReport {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{} moved, {} given back, {} skipped; {} mappings before, {} after",
            Readable(self.moved_bytes),
            Readable(self.returned_bytes),
            Readable(self.skipped_bytes),
            self.chunks_before,
            self.chunks_after,
        )
    }
}
