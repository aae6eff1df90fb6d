//! What the engine does not have yet: it answers `None` until it has.

use anyhow::Result;
use cuda_vmm::VirtualMemoryPool;

/// Why figures of compaction are missing.
pub const NO_COMPACTION: &str = "the engine does not compact yet";

/// Returns the slack of a range.
pub fn compact(_pool: &mut VirtualMemoryPool) -> Option<Result<()>> {
    None
}
