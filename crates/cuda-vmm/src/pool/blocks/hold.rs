//! Keeping all blocks where they are while work is launched.

use super::BlockId;
use super::memory::BlockMemory;
use crate::Result;
use crate::sync::Arc;

/// Keeps every block where it is while it lives; made by
/// [`BlockBacking::hold`](super::BlockBacking::hold).
#[derive(Debug)]
#[must_use = "the blocks are kept only while the hold lives"]
pub struct BlockHold {
    backing: Arc<BlockMemory>,
    generation: u64,
}

impl BlockHold {
    pub(super) fn new(backing: Arc<BlockMemory>) -> Result<Self> {
        // Not by `change`: a hold serves no thread that waits.
        let generation = backing.once(|_| true)?.hold_all();
        Ok(Self {
            backing,
            generation,
        })
    }

    /// The first of these blocks that is not backed, or does not exist; `None` if all are backed.
    ///
    /// # Errors
    /// [`VmmError::Forked`](crate::VmmError::Forked).
    pub fn find_missing(
        &self,
        blocks: impl IntoIterator<Item = BlockId>,
    ) -> Result<Option<BlockId>> {
        let mut blocks = blocks.into_iter();
        self.backing
            .look(|states| blocks.find(|block| !states.is_backed(*block)))
    }

    /// How many calls have given blocks up. If it is the same as under an earlier hold, all blocks
    /// that were backed then are backed.
    pub fn generation(&self) -> u64 {
        self.generation
    }
}

impl Drop for BlockHold {
    fn drop(&mut self) {
        // A forked process has no holds to give back.
        let _ = self.backing.change(|states| states.let_all_go());
    }
}
