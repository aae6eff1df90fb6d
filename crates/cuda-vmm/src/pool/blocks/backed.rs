//! Blocks that are backed until a guard is dropped.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::BlockId;
use super::memory::BlockMemory;
use super::runs::Runs;
use crate::sync::Arc;

/// Blocks that [`BlockBacking::try_reserve`](super::BlockBacking::try_reserve) has newly backed.
///
/// Dropping it gives them up again, except those that are pinned by then, or that another call has
/// backed or used meanwhile.
#[derive(Debug)]
#[must_use = "dropping it gives the blocks up again"]
pub struct BackedBlocks {
    memory: Arc<BlockMemory>,
    newly: Runs,
    clock: u64,
}

impl BackedBlocks {
    pub(super) fn new(memory: Arc<BlockMemory>, newly: Runs, clock: u64) -> Self {
        Self {
            memory,
            newly,
            clock,
        }
    }

    /// The blocks that were not backed before, in order.
    pub fn newly_backed(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.newly.blocks()
    }

    /// Keeps the blocks backed, and consumes the guard.
    pub fn keep(mut self) {
        self.newly = Runs::default();
    }
}

impl Drop for BackedBlocks {
    fn drop(&mut self) {
        if !self.newly.is_empty() {
            self.memory.undo(&self.newly, self.clock);
        }
    }
}
