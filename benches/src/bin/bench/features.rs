//! What the engine does not have yet: each answers `None` until it has.

use anyhow::Result;
use cuda_vmm::{Engine, EngineStats, VirtualMemoryPool};

/// Why figures of prefetching are missing.
pub const NO_PREFETCH: &str = "the engine makes no memory ahead of need yet";
/// Why figures of compaction are missing.
pub const NO_COMPACTION: &str = "the engine does not compact yet";

/// A range for which memory is made ahead, up to so many bytes.
pub fn prefetched(
    _engine: &Engine,
    _capacity_bytes: usize,
    _page_bytes: usize,
    _ahead_bytes_max: usize,
) -> Option<Result<VirtualMemoryPool>> {
    None
}

/// What is made ahead, in bytes.
pub fn ahead_bytes(_stats: &EngineStats) -> usize {
    0
}

/// Returns the slack of a range.
pub fn compact(_pool: &mut VirtualMemoryPool) -> Option<Result<()>> {
    None
}
