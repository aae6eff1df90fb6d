//! Carrying out a plan.
//!
//! # Safety
//! The one unsafe call queues copies on the caller's stream. While they are queued the record has
//! both blocks: the source is leaving, the target is held, so no other call gives them up.
//! Afterwards their memory retires behind an event recorded after the copies.
#![allow(unsafe_code)]

use super::memory::BlockMemory;
use super::{BlockError, BlockId, ReclaimPlan};
use crate::sync::Arc;
use crate::{Result, Stream};

impl BlockMemory {
    /// Carries out a plan. It calls `begin` when the plan is still true and its blocks are
    /// reserved; `begin` may refuse it. After that it calls `end`, with whether the plan was
    /// carried out. Both run with the record locked.
    pub(super) fn commit(
        &self,
        plan: &ReclaimPlan,
        stream: &Stream,
        begin: impl FnOnce(&ReclaimPlan) -> Result<()>,
        end: impl FnOnce(bool),
    ) -> Result<()> {
        self.check_process()?;
        self.account
            .engine()
            .device()
            .expect_same(stream.device())?;
        if !plan.is_of(&self.identity) {
            return Err(BlockError::ForeignPlan.into());
        }
        let moves = plan.moves();
        if !moves.is_empty() && stream.is_capturing()? {
            let moves = moves.len();
            return Err(BlockError::Capturing { moves }.into());
        }
        let mut states = self.once(|states| !states.is_held())?;
        let departure = states.depart(plan)?;
        if let Err(error) = begin(plan) {
            states.departed(&departure, false);
            return Err(error);
        }
        drop(states);
        let moved = self.copy(moves, stream);
        if moved.is_ok() {
            self.give(&departure.leaving);
        } else {
            // Some copies may be queued, and the blocks they write are free again. What cannot be
            // waited for on a context that is beyond use does not run either.
            let _ = stream.synchronize();
        }
        self.change(|states| {
            states.departed(&departure, moved.is_ok());
            end(moved.is_ok());
        })?;
        moved
    }

    fn copy(&self, moves: &[(BlockId, BlockId)], stream: &Stream) -> Result<()> {
        if moves.is_empty() {
            return Ok(());
        }
        for tensor in &self.tensors {
            tensor.pool().order_stream(stream)?;
        }
        for tensor in &self.tensors {
            for (from, to) in moves {
                let (from, to) = (tensor.address(*from), tensor.address(*to));
                // SAFETY: both blocks are backed and reserved by this commit, and what is freed of
                // them later is unmapped behind the stream, as above.
                unsafe { stream.copy(to, from, tensor.block_bytes()) }?;
            }
        }
        // The stream is not named for this: its other work does not use the blocks.
        let end = Arc::new(stream.record()?);
        let mut tensors = self.tensors.iter();
        tensors.try_for_each(|tensor| tensor.pool().add_end(&end))
    }
}
