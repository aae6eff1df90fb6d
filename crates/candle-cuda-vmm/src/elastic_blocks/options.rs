//! The options of the tensors of a paged cache.

use cuda_vmm::Stream;
use cuda_vmm::pool::blocks::BlockOptions;

/// Options of [`ElasticBlocks`](super::ElasticBlocks).
///
/// ```
/// use candle_cuda_vmm::ElasticBlocksOptions;
///
/// // 128 sequences need at most 128 blocks in a step.
/// let options = ElasticBlocksOptions::new().ahead_blocks_max(256);
/// assert_eq!(options.ahead_blocks_max, 256);
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ElasticBlocksOptions {
    /// For how many blocks the engine's worker makes memory before they are backed, so that a step
    /// calls no driver; see [`BlockOptions::ahead_blocks_max`].
    ///
    /// Those are the next that the [allocator](super::ElasticBlocks::allocator) hands out, or those
    /// that [`prefetch`](super::ElasticBlocks::prefetch) names.
    pub ahead_blocks_max: usize,
    /// Whether blocks that are backed anew are zeroed on Candle's stream before they are used; see
    /// [`BlockOptions::zero_on_back`]. Blocks that are backed already keep what they hold.
    pub zero_on_back: bool,
}

impl ElasticBlocksOptions {
    /// The default options: nothing is made ahead, and nothing is zeroed.
    pub const fn new() -> Self {
        Self {
            ahead_blocks_max: 0,
            zero_on_back: false,
        }
    }

    /// Sets for how many blocks memory is made ahead.
    pub const fn ahead_blocks_max(mut self, blocks: usize) -> Self {
        self.ahead_blocks_max = blocks;
        self
    }

    /// Sets whether blocks that are backed anew are zeroed.
    pub const fn zero_on_back(mut self, zero: bool) -> Self {
        self.zero_on_back = zero;
        self
    }

    /// The core's options, with this stream for the zeros.
    pub(super) fn on_stream(&self, stream: &Stream) -> BlockOptions {
        let options = BlockOptions::new().ahead_blocks_max(self.ahead_blocks_max);
        match self.zero_on_back {
            true => options.zero_on_back(stream),
            false => options,
        }
    }
}
