//! What to give up so that pages empty.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::BlockId;
use super::reclaim::Reclaim;
use crate::sync::Arc;

/// Which blocks to evict and which to move so that whole pages empty; made by
/// [`BlockBacking::reclaim_candidates`](super::BlockBacking::reclaim_candidates) and carried out by
/// [`BlockBacking::commit`](super::BlockBacking::commit). By itself it changes nothing.
///
/// Each block that it evicts or moves away is in a page that it empties.
#[derive(Debug, Clone)]
pub struct ReclaimPlan {
    reclaim: Reclaim,
    asked_bytes: usize,
    /// The clock of the record that it was made from.
    clock: u64,
    /// The backing that made it.
    identity: Arc<()>,
}

impl ReclaimPlan {
    pub(super) fn new(reclaim: Reclaim, asked_bytes: usize, clock: u64, identity: Arc<()>) -> Self {
        Self {
            reclaim,
            asked_bytes,
            clock,
            identity,
        }
    }

    /// Blocks whose contents are given up, in order.
    pub fn evicted(&self) -> &[BlockId] {
        &self.reclaim.evicted
    }

    /// Pairs of blocks: each first block moves into the second. They are in the order of the first.
    /// The contents of the second are given up, as if it were evicted. Tables that name the first
    /// must name the second after the commit.
    pub fn moves(&self) -> &[(BlockId, BlockId)] {
        &self.reclaim.moves
    }

    /// The memory that it frees in whole pages of all tensors, in bytes.
    pub fn freed_bytes(&self) -> usize {
        self.reclaim.freed_bytes
    }

    /// The memory that was asked for, in bytes.
    pub fn asked_bytes(&self) -> usize {
        self.asked_bytes
    }

    /// Whether it frees as much as was asked for.
    pub fn is_enough(&self) -> bool {
        self.freed_bytes() >= self.asked_bytes
    }

    /// Whether it evicts and moves nothing.
    pub fn is_empty(&self) -> bool {
        self.evicted().is_empty() && self.moves().is_empty()
    }

    /// What it costs in all, in the unit of the costs that it was made from.
    pub fn cost(&self) -> f64 {
        self.reclaim.cost
    }

    /// The pages that it empties, for each class of tensors.
    pub(super) fn pages(&self) -> &[Vec<usize>] {
        &self.reclaim.pages
    }

    pub(super) fn clock(&self) -> u64 {
        self.clock
    }

    pub(super) fn is_of(&self, identity: &Arc<()>) -> bool {
        Arc::ptr_eq(&self.identity, identity)
    }
}
