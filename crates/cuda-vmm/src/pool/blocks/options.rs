//! How a backing is made.

/// How a [`BlockBacking`](super::BlockBacking) is made.
///
/// ```
/// use cuda_vmm::pool::blocks::BlockOptions;
///
/// let options = BlockOptions::new().ahead_blocks_max(256);
/// assert_eq!(options.ahead_blocks_max, 256);
/// ```
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct BlockOptions {
    /// For how many blocks the engine's worker makes memory before they are backed, so that
    /// [`back`](super::BlockBacking::back) calls no driver. 0, the default, makes none.
    ///
    /// Those are the next that a [`BlockAllocator`](super::BlockAllocator) hands out, or those that
    /// [`prefetch`](super::BlockBacking::prefetch) names. It takes whole pages of each tensor, and
    /// begins again when half of them are left. So let it be twice what the sequences take while
    /// the worker makes a page of each tensor, and as much as the longest prompt that is to call no
    /// driver. The memory is charged to the account and given up first; see
    /// [`PoolOptions::ahead_bytes_max`](crate::PoolOptions::ahead_bytes_max).
    pub ahead_blocks_max: usize,
}

impl BlockOptions {
    /// The defaults: nothing made ahead.
    pub const fn new() -> Self {
        Self {
            ahead_blocks_max: 0,
        }
    }

    /// With memory made ahead for up to this many blocks.
    pub const fn ahead_blocks_max(mut self, blocks: usize) -> Self {
        self.ahead_blocks_max = blocks;
        self
    }
}
