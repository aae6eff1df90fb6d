//! Numbers of an engine, taken in one moment.

use crate::MemoryParts;
use crate::size::Readable;
use core::fmt;

/// What an engine holds. The parts add up to [`committed_bytes`](Self::committed_bytes) in every
/// snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
#[non_exhaustive]
pub struct EngineStats {
    /// The budget in bytes.
    pub limit_bytes: usize,
    /// What the device really holds for this engine, in bytes.
    pub committed_bytes: usize,
    /// The same, by what it is.
    pub parts: MemoryParts,
    /// Ranges, including those that are closing.
    pub ranges: usize,
    /// Mappings.
    pub chunks: usize,
}

impl fmt::Display for EngineStats {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{} committed of {}: {}; {} ranges, {} mappings",
            Readable(self.committed_bytes),
            Readable(self.limit_bytes),
            self.parts,
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
