//! How a backing is made.

use crate::Stream;

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
    /// The stream on which blocks that are backed anew are zeroed; `None`, the default, leaves them
    /// as they are.
    ///
    /// The zeros are queued (`cuMemsetD8Async`, once for each run of blocks in each tensor) before
    /// [`back`](super::BlockBacking::back) returns. Work that is queued on this stream later finds
    /// zeros. Order work of other streams behind it. Order this stream behind work of others on
    /// blocks that are given up: the page of a block may stay, because of other blocks in it, and
    /// then the zeros wait for no other stream. Blocks that are backed already keep what they hold,
    /// those among them that a [`BlockAllocator`](super::BlockAllocator) hands out again.
    ///
    /// The backing holds the stream and names it for good, as by
    /// [`use_stream`](super::BlockBacking::use_stream). So name the others that use the blocks.
    pub zero_on_back: Option<Stream>,
}

impl BlockOptions {
    /// The defaults: nothing made ahead, nothing zeroed.
    pub const fn new() -> Self {
        Self {
            ahead_blocks_max: 0,
            zero_on_back: None,
        }
    }

    /// With memory made ahead for up to this many blocks.
    pub const fn ahead_blocks_max(mut self, blocks: usize) -> Self {
        self.ahead_blocks_max = blocks;
        self
    }

    /// With blocks that are backed anew zeroed on this stream.
    pub fn zero_on_back(mut self, stream: &Stream) -> Self {
        self.zero_on_back = Some(stream.clone());
        self
    }
}
