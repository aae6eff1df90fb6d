//! The numbers of a backing.

use crate::size::Readable;
use core::fmt;

/// What a backing has, and what the device holds for it. The blocks are counted in one moment, the
/// memory of each tensor a little later, one after the other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
#[non_exhaustive]
pub struct BlockStats {
    /// How many blocks there are.
    pub blocks: usize,
    /// Blocks with memory behind them.
    pub backed_blocks: usize,
    /// Blocks that a pin, or a call under way, keeps where they are.
    pub pinned_blocks: usize,
    /// One block in bytes, in all tensors.
    pub block_bytes: usize,
    /// The pages that hold a block that is backed, being backed or being given up, in bytes.
    pub page_bytes: usize,
    /// What the device really holds for all tensors, in bytes: those pages, and what is retiring or
    /// parked.
    pub committed_bytes: usize,
}

impl BlockStats {
    /// The blocks with memory behind them, in bytes, without what shares their pages.
    pub fn backed_bytes(&self) -> usize {
        self.backed_blocks * self.block_bytes
    }
}

impl fmt::Display for BlockStats {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{} of {} blocks backed, {} pinned, {} each; {} in pages, {} committed",
            self.backed_blocks,
            self.blocks,
            self.pinned_blocks,
            Readable(self.block_bytes),
            Readable(self.page_bytes),
            Readable(self.committed_bytes),
        )
    }
}
