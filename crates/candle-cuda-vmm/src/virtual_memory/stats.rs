//! Statistics of the pools.

use cuda_vmm::{EngineStats, PoolStats};

/// Statistics of one range: an elastic pool's, or a model's.
#[derive(Debug, Clone)]
pub struct MemoryStats {
    /// Size of the range in bytes.
    pub virtual_capacity: usize,
    /// Bytes of live pages.
    pub physical_usage: usize,
    /// Number of live pages.
    pub mapped_pages: usize,
    /// How scattered the range's unused bytes are: 1 − largest run ÷ total. 0.0 if they are one
    /// run, or if there are none; near 1.0 if they are many small runs.
    pub fragmentation_ratio: f32,
}

impl From<PoolStats> for MemoryStats {
    fn from(stats: PoolStats) -> Self {
        Self {
            virtual_capacity: stats.capacity_bytes,
            physical_usage: stats.parts.live_page_bytes,
            mapped_pages: stats.live_pages,
            fragmentation_ratio: fragmentation(stats.largest_unused_run_bytes, stats.unused_bytes),
        }
    }
}

/// Returns 1 − `largest_run` ÷ `total`, or 0 if `total` is 0.
fn fragmentation(largest_run: usize, total: usize) -> f32 {
    if total == 0 {
        return 0.0;
    }
    (1.0 - largest_run as f64 / total as f64) as f32
}

/// Statistics of all models of a shared pool together.
#[derive(Debug, Clone)]
pub struct GlobalMemoryStats {
    /// The pool's limit of physical memory in bytes.
    pub physical_limit: usize,
    /// Bytes of live pages of all models.
    pub physical_usage: usize,
    /// Number of registered models.
    pub num_models: usize,
}

impl GlobalMemoryStats {
    pub(super) fn new(physical_limit: usize, num_models: usize, stats: &EngineStats) -> Self {
        Self {
            physical_limit,
            physical_usage: stats.parts.live_page_bytes,
            num_models,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::fragmentation;

    #[test]
    fn fragmentation_is_of_the_unused_bytes() {
        assert_eq!(fragmentation(0, 0), 0.0);
        assert_eq!(fragmentation(8, 8), 0.0);
        assert_eq!(fragmentation(6, 8), 0.25);
        assert_eq!(fragmentation(1, usize::MAX), 1.0);
    }
}
