//! One tensor whose blocks are backed where they are in use.

use super::{BlockId, ElementSize, TensorSpec};
use crate::engine::{Hint, RangeHandle};
use crate::pool::{PoolPart, PoolStats, VirtualMemoryPool};
use crate::sync::Arc;
use crate::{Account, LeaseToken, PoolOptions, Result};
use core::ops::Range;

/// One tensor of a [`BlockBacking`](super::BlockBacking): `[num_blocks, block_shape…]`, contiguous,
/// at addresses that stay while the backing lives.
#[derive(Debug)]
pub struct BlockTensor {
    spec: TensorSpec,
    blocks: usize,
    /// Which of the layout's classes it is of.
    class: usize,
    /// All its addresses. Nothing else takes or frees bytes of it.
    pool: VirtualMemoryPool,
}

impl BlockTensor {
    /// Reserves the addresses; that `blocks` blocks fit in an address was checked. Memory is made
    /// ahead for at most `ahead_blocks`, which are not more.
    pub(super) fn new(
        account: &Account,
        spec: TensorSpec,
        blocks: usize,
        (class, page_bytes): (usize, usize),
        ahead_blocks: usize,
    ) -> Result<Self> {
        let ahead_pages = (ahead_blocks * spec.block_bytes()).div_ceil(page_bytes);
        // Any page may be the one that empties, so each goes back alone.
        let options = PoolOptions::new().chunk_bytes_max(0);
        let options = options.ahead_bytes_max(ahead_pages.saturating_mul(page_bytes));
        let capacity_bytes = blocks * spec.block_bytes();
        let pool = VirtualMemoryPool::on_account(account, capacity_bytes, page_bytes, options)?;
        Ok(Self {
            spec,
            blocks,
            class,
            pool,
        })
    }

    /// The name of the tensor.
    pub fn name(&self) -> &str {
        self.spec.name()
    }

    /// The shape of the tensor: `[num_blocks, block_shape…]`.
    pub fn shape(&self) -> Vec<usize> {
        let mut shape = vec![self.blocks];
        shape.extend(self.spec.block_shape());
        shape
    }

    /// The shape of one block.
    pub fn block_shape(&self) -> &[usize] {
        self.spec.block_shape()
    }

    /// The size of the tensor's elements.
    pub fn element(&self) -> ElementSize {
        self.spec.element()
    }

    /// The size of one block in bytes, which is also the distance from one block to the next.
    pub fn block_bytes(&self) -> usize {
        self.spec.block_bytes()
    }

    /// The address of block 0.
    pub fn base_address(&self) -> u64 {
        self.pool.base_address()
    }

    /// The size of the tensor's addresses in bytes.
    pub fn capacity_bytes(&self) -> usize {
        self.pool.capacity_bytes()
    }

    /// The numbers of the tensor's memory.
    pub fn stats(&self) -> PoolStats {
        self.pool.stats()
    }

    pub(super) fn class(&self) -> usize {
        self.class
    }

    pub(super) fn range(&self) -> &RangeHandle {
        &self.pool.range
    }

    pub(super) fn pool(&self) -> &VirtualMemoryPool {
        &self.pool
    }

    /// The address of a block, which exists.
    pub(super) fn address(&self, block: BlockId) -> u64 {
        self.base_address() + (block * self.block_bytes()) as u64
    }

    /// Keeps blocks, all of them backed, until the token is released.
    pub(super) fn lease(&self, blocks: &Range<BlockId>, token: impl LeaseToken) -> Result<()> {
        let bytes = self.bytes(blocks);
        self.pool.lease(bytes.start, bytes.len(), token)
    }

    /// Runs of blocks whose memory is leased, backed or not.
    pub(super) fn leased(&self) -> impl Iterator<Item = Range<BlockId>> {
        let block_bytes = self.block_bytes();
        let leased = self.pool.leased().into_iter();
        leased.map(move |bytes| bytes.start / block_bytes..bytes.end.div_ceil(block_bytes))
    }

    /// Sets which pages the next blocks need; returns whether the worker has any to make.
    pub(super) fn expect(&self, pages: &Arc<Hint>) -> Result<bool> {
        self.pool.range.expect(pages.clone())
    }

    pub(super) fn wake_worker(&self) {
        self.pool.range.wake_worker();
    }

    /// Where a run of blocks begins, and its length, in bytes.
    fn bytes(&self, blocks: &Range<BlockId>) -> Range<usize> {
        blocks.start * self.block_bytes()..blocks.end * self.block_bytes()
    }

    /// A run of blocks, as bytes of its pool.
    pub(super) fn part(&self, blocks: &Range<BlockId>) -> PoolPart<'_> {
        let bytes = self.bytes(blocks);
        (&self.pool, bytes.start, bytes.len())
    }

    /// Runs of blocks as bytes of its range, to be freed.
    pub(super) fn parts(
        &self,
        runs: impl IntoIterator<Item = Range<BlockId>>,
    ) -> (&RangeHandle, Vec<(usize, usize)>) {
        let parts = runs.into_iter().map(|run| {
            let bytes = self.bytes(&run);
            (bytes.start, bytes.len())
        });
        (&self.pool.range, parts.collect())
    }
}
