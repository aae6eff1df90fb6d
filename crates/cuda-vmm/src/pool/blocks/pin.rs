//! Keeping blocks where they are.

use super::BlockId;
use super::memory::BlockMemory;
use super::runs::Runs;
use crate::sync::Arc;

/// Keeps blocks backed, at their addresses, while it lives; made by
/// [`BlockBacking::pin`](super::BlockBacking::pin).
///
/// It shares the backing, so the memory stays mapped if the backing is dropped first. The last of
/// them to be dropped gives everything back, and waits for the device to do so.
///
/// Hold one for the life of a tensor made over the blocks, or of a graph that names them. A graph
/// whose kernels follow a block table names none: the table is an input. Back what it names before
/// each launch, on a stream that the backing [names](super::BlockBacking::use_stream). Pin what is
/// the same in each launch, such as a block that pads tables. Memory behind a pin is not given
/// back, so do not pin all.
#[derive(Debug)]
#[must_use = "the blocks are kept only while the pin lives"]
pub struct BlockPin {
    backing: Arc<BlockMemory>,
    runs: Runs,
}

impl BlockPin {
    /// A pin of blocks that the record has pinned.
    pub(super) fn new(backing: Arc<BlockMemory>, runs: Runs) -> Self {
        Self { backing, runs }
    }

    /// The blocks, in order.
    pub fn blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.runs.blocks()
    }
}

impl Drop for BlockPin {
    fn drop(&mut self) {
        // A forked process has no pins to give back.
        let _ = self.backing.change(|states| states.unpin(&self.runs));
    }
}
