//! What a backing, its pins and its commits share: the tensors, and the books behind their lock.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::books::{Arrival, Books};
use super::layout::Layout;
use super::plan::ReclaimPlan;
use super::reclaim::{Candidate, reclaim};
use super::runs::Runs;
use super::{BlockError, BlockId, BlockTensor};
use crate::process::Here;
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use crate::{Engine, Result, VmmError};

#[derive(Debug)]
pub(super) struct BlockMemory {
    pub(super) engine: Engine,
    pub(super) tensors: Vec<BlockTensor>,
    pub(super) layout: Layout,
    pub(super) page_bytes: usize,
    pub(super) books: Here<Mutex<Books>>,
    pub(super) changed: Condvar,
    /// Which backing a plan is of.
    pub(super) identity: Arc<()>,
}

impl BlockMemory {
    pub(super) fn check_process(&self) -> Result<()> {
        self.engine.device().driver().check_process()
    }

    /// These blocks, all of which there are.
    pub(super) fn runs(&self, blocks: impl IntoIterator<Item = BlockId>) -> Result<Runs> {
        let blocks: Vec<_> = blocks.into_iter().collect();
        let all = self.layout.blocks;
        // Here, since behind the largest number there is none to end a run.
        match blocks.iter().filter(|block| **block >= all).min() {
            Some(block) => Err(BlockError::Invalid {
                block: *block,
                blocks: all,
            }
            .into()),
            None => Ok(Runs::of(blocks)),
        }
    }

    pub(super) fn look<T>(&self, look: impl FnOnce(&Books) -> T) -> Result<T> {
        Ok(look(&*self.books.lock()?))
    }

    /// Changes the books and wakes those who wait for that.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Books) -> T) -> Result<T> {
        let outcome = change(&mut *self.books.lock()?);
        self.changed.notify_all();
        Ok(outcome)
    }

    /// The books, once nobody is backing or giving up any of the blocks.
    pub(super) fn settled(&self, runs: &Runs) -> Result<MutexGuard<'_, Books>> {
        let mut books = self.books.lock()?;
        while !books.is_settled(runs) {
            books = self
                .changed
                .wait(books)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Ok(books)
    }

    pub(super) fn back(&self, runs: &Runs, wait: bool) -> Result<()> {
        let mut books = self.settled(runs)?;
        let missing_bytes = books.missing_bytes(&self.layout, runs);
        let arrival = books.arrive(runs);
        drop(books);
        let outcome = match arrival.missing.is_empty() {
            true => Ok(()),
            false => self.take(&arrival, missing_bytes, wait),
        };
        self.change(|books| books.arrived(&arrival, outcome.is_ok()))?;
        outcome
    }

    /// Takes the blocks in all tensors, or frees again what it has taken.
    fn take(&self, arrival: &Arrival, missing_bytes: usize, wait: bool) -> Result<()> {
        self.expect_room(missing_bytes)?;
        let wanted = || {
            let tensors = self.tensors.iter();
            tensors.flat_map(|tensor| arrival.missing.iter().map(move |run| (tensor, run)))
        };
        for (done, (tensor, run)) in wanted().enumerate() {
            if let Err(error) = tensor.take(&run, wait) {
                for (tensor, run) in wanted().take(done) {
                    tensor.give([run]);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Refuses at once what the engine's budget cannot hold even if all that nobody uses is given
    /// up.
    fn expect_room(&self, asked_bytes: usize) -> Result<()> {
        if asked_bytes == 0 {
            return Ok(());
        }
        let stats = self.engine.stats();
        let parts = stats.parts;
        let used_bytes = parts.live_page_bytes
            + parts.slack_bytes
            + parts.filling_bytes
            + parts.quarantined_bytes;
        if asked_bytes <= stats.limit_bytes.saturating_sub(used_bytes) {
            return Ok(());
        }
        Err(VmmError::OutOfPhysicalMemory {
            asked_bytes,
            free_bytes: stats.limit_bytes.saturating_sub(stats.committed_bytes),
            retiring_bytes: parts.retiring_bytes,
            reclaimable_bytes: parts.reclaimable_bytes(),
            limit_bytes: stats.limit_bytes,
        })
    }

    /// Frees blocks in all tensors.
    pub(super) fn give(&self, runs: &Runs) {
        for tensor in &self.tensors {
            tensor.give(runs.iter());
        }
    }

    pub(super) fn plan(
        &self,
        bytes: usize,
        move_cost: Option<f64>,
        cost: impl Fn(BlockId) -> Option<f64>,
    ) -> ReclaimPlan {
        // A forked process has no plans: the lock may be held for good.
        let candidates = self.look(Books::candidates);
        let (mut candidates, clock) = candidates.unwrap_or_default();
        candidates.resize(self.layout.blocks, Candidate::Absent);
        // Looked at after the books: a lease that is made meanwhile makes the plan stale. Blocks
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
