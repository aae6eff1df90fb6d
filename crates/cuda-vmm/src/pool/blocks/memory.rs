//! What a backing, its pins and its commits share: the tensors, and the record of blocks behind its
//! lock.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::block_states::{Arrival, BlockStates, Rest};
use super::layout::Layout;
use super::packing::Packing;
use super::plan::ReclaimPlan;
use super::reclaim::{Candidate, reclaim};
use super::runs::Runs;
use super::{BlockError, BlockId, BlockTensor};
use crate::engine::{Hint, Patience, Reclaimer, deallocate_together};
use crate::process::Here;
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use crate::{Account, Result, Stream};
use core::ops::Range;

#[derive(Debug)]
pub(super) struct BlockMemory {
    pub(super) account: Account,
    pub(super) tensors: Vec<BlockTensor>,
    pub(super) layout: Layout,
    pub(super) page_bytes: usize,
    pub(super) states: Here<Mutex<BlockStates>>,
    pub(super) changed: Condvar,
    /// Which backing a plan is of.
    pub(super) identity: Arc<()>,
    /// What an allocator knows of the blocks, if there is one.
    pub(super) packing: Mutex<Weak<Here<Mutex<Packing>>>>,
    /// Where blocks that are backed anew are zeroed, if they are.
    pub(super) zero_on_back: Option<Stream>,
    /// For how many blocks memory is made ahead.
    pub(super) ahead_blocks: usize,
    /// The pages of each class that were last named to the ranges. Locked before the other locks
    /// here.
    pub(super) named: Here<Mutex<Vec<Arc<Hint>>>>,
}

impl Reclaimer for BlockMemory {
    fn reclaimable_bytes(&self) -> usize {
        let packing = self.packing.lock();
        let packing = packing.unwrap_or_else(PoisonError::into_inner).upgrade();
        let is_used = |block| {
            let packing = packing.as_ref().and_then(|packing| packing.lock().ok());
            packing.is_some_and(|packing| packing.is_taken(block))
        };
        let cost = |block| (!is_used(block)).then_some(0.0);
        self.plan(usize::MAX, None, cost).freed_bytes()
    }
}

impl BlockMemory {
    /// Sets what an allocator knows of the blocks.
    pub(super) fn set_packing(&self, packing: &Arc<Here<Mutex<Packing>>>) {
        let mut known = self.packing.lock().unwrap_or_else(PoisonError::into_inner);
        *known = Arc::downgrade(packing);
    }

    pub(super) fn check_process(&self) -> Result<()> {
        self.account.engine().device().driver().check_process()
    }

    /// Sorts block numbers into runs, after a check that all of them exist.
    pub(super) fn runs(&self, blocks: impl IntoIterator<Item = BlockId>) -> Result<Runs> {
        let blocks: Vec<_> = blocks.into_iter().collect();
        let all = self.layout.blocks;
        // Checked here, as no number follows the largest one to end a run.
        match blocks.iter().filter(|block| **block >= all).min() {
            Some(block) => Err(BlockError::Invalid {
                block: *block,
                blocks: all,
            }
            .into()),
            None => Ok(Runs::of(blocks)),
        }
    }

    pub(super) fn look<T>(&self, look: impl FnOnce(&BlockStates) -> T) -> Result<T> {
        Ok(look(&*self.states.lock()?))
    }

    /// Changes the record and wakes the threads that wait for that.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut BlockStates) -> T) -> Result<T> {
        let outcome = change(&mut *self.states.lock()?);
        self.changed.notify_all();
        Ok(outcome)
    }

    /// The record, as soon as no other call backs or gives up any of the blocks.
    pub(super) fn settled(&self, runs: &Runs) -> Result<MutexGuard<'_, BlockStates>> {
        self.once(|states| states.is_settled(runs))
    }

    /// The record, as soon as it is so. Fails if the blocks are asleep.
    pub(super) fn once(
        &self,
        is_so: impl Fn(&BlockStates) -> bool,
    ) -> Result<MutexGuard<'_, BlockStates>> {
        let mut states = self.states.lock()?;
        while !is_so(&states) {
            states = self
                .changed
                .wait(states)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let rest = states.rest;
        match rest {
            Rest::Awake => Ok(states),
            _ => {
                drop(states);
                Err(self.asleep(rest))
            }
        }
    }

    /// Backs blocks in all tensors, or none; returns those that were not backed before, and the
    /// clock of the record then.
    pub(super) fn back(&self, runs: &Runs, patience: &Patience) -> Result<(Runs, u64)> {
        let mut states = self.settled(runs)?;
        let arrival = states.arrive(runs);
        let clock = states.clock();
        drop(states);
        let outcome = match arrival.missing.is_empty() {
            true => Ok(()),
            false => self.zeroing(&arrival.missing).and_then(|stream| {
                self.take(&arrival, patience)?;
                stream.map_or(Ok(()), |stream| self.zero(&arrival.missing, stream))
            }),
        };
        self.change(|states| states.arrived(&arrival, outcome.is_ok()))?;
        outcome.map(|()| (arrival.missing, clock))
    }

    /// Takes the blocks in all tensors, or none of them.
    fn take(&self, arrival: &Arrival, patience: &Patience) -> Result<()> {
        let tensors = self.tensors.iter();
        let parts: Vec<_> = tensors
            .flat_map(|tensor| arrival.missing.iter().map(|run| tensor.part(&run)))
            .collect();
        self.account.allocate_parts(&parts, patience)?.keep();
        Ok(())
    }

    /// Names the pages that the next blocks need and that hold none yet, so that the worker makes
    /// them. `next` returns runs of blocks in order, of no more than `ahead_blocks`.
    pub(super) fn expect(&self, next: impl FnOnce() -> Result<Vec<Range<BlockId>>>) -> Result<()> {
        if self.ahead_blocks == 0 {
            return Ok(());
        }
        let mut named = self.named.lock()?;
        let next = next()?;
        let hints = self.look(|states| states.empty_pages(&next))?;
        let mut hungry = None;
        let mut now = Vec::with_capacity(hints.len());
        for (class, hint) in hints.into_iter().enumerate() {
            if let Some(same) = named.get(class).filter(|named| ***named == hint) {
                now.push(same.clone());
                continue;
            }
            let hint = Arc::new(hint);
            for tensor in (self.tensors.iter()).filter(|tensor| tensor.class() == class) {
                if tensor.expect(&hint)? {
                    hungry = Some(tensor);
                }
            }
            now.push(hint);
        }
        *named = now;
        drop(named);
        if let Some(tensor) = hungry {
            tensor.wake_worker();
        }
        Ok(())
    }

    /// Gives up blocks that no call has used since the record had this clock, and that nothing
    /// keeps.
    pub(super) fn undo(&self, runs: &Runs, clock: u64) {
        let is_free = |states: &BlockStates| states.is_settled(runs) && !states.is_held();
        let Ok(mut states) = self.once(is_free) else {
            return;
        };
        let unused = states.leave_unused(runs, clock);
        drop(states);
        self.give(&unused);
        // The process was checked above.
        _ = self.change(|states| states.left(&unused));
    }

    /// Frees blocks in all tensors, behind the same fences.
    pub(super) fn give(&self, runs: &Runs) {
        if runs.is_empty() {
            return;
        }
        let tensors = self.tensors.iter();
        // The bytes are live, nothing compacts the ranges, and they close after the last use of
        // them: what is left is a process that was forked meanwhile, whose memory is the parent's.
        deallocate_together(tensors.map(|tensor| tensor.parts(runs.iter())), |error| {
            crate::events::warn!(%error, "blocks could not be freed");
        });
    }

    pub(super) fn plan(
        &self,
        bytes: usize,
        move_cost: Option<f64>,
        cost: impl Fn(BlockId) -> Option<f64>,
    ) -> ReclaimPlan {
        // A forked process has no plans: the lock may be held for good.
        let candidates = self.look(BlockStates::candidates);
        let (mut candidates, clock) = candidates.unwrap_or_default();
        candidates.resize(self.layout.blocks, Candidate::Absent);
        // Looked at after the record: a lease that is made meanwhile makes the plan stale. Blocks
        // that were given up under a lease keep their pages too.
        for blocks in self.tensors.iter().flat_map(BlockTensor::leased) {
            candidates[blocks].fill(Candidate::Fixed);
        }
        for (block, candidate) in candidates.iter_mut().enumerate() {
            if let Candidate::Held { evict } = candidate {
                *evict = cost(block)
                    .filter(|cost| cost.is_finite())
                    .map(|cost| cost.max(0.0));
            }
        }
        let reclaim = reclaim(&self.layout, &candidates, bytes, move_cost);
        ReclaimPlan::new(reclaim, bytes, clock, self.identity.clone())
    }
}
