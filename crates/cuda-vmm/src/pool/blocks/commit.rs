//! Carrying out a plan.
//!
//! # Safety
//! The one unsafe call queues copies on the caller's stream. While they are queued the books have
//! both blocks: the source is leaving, the target is held, so no other call gives them up.
//! Afterwards their memory retires behind an event recorded after the copies.
#![allow(unsafe_code)]

use super::memory::BlockMemory;
use super::{BlockError, BlockId, ReclaimPlan};
use crate::sync::Arc;
use crate::{Result, Stream};

impl BlockMemory {
    /// `begin` is called when the plan was found true and its blocks are reserved, and can still
    /// refuse it; `end` when it was carried out, or when it failed after that, with whether it was.
    /// Both are called with the books locked.
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
        let departure = self.change(|books| {
            let departure = books.depart(&self.layout, plan)?;
            match begin(plan) {
                Ok(()) => Ok(departure),
                Err(error) => {
                    books.departed(&departure, false);
                    Err(error)
                }
            }
        })??;
        let moved = self.copy(moves, stream);
        if moved.is_ok() {
            self.give(&departure.leaving);
        } else {
            // Some copies may be queued, and the blocks they write are free again. What cannot be
            // waited for on a context that is beyond use does not run either.
            let _ = stream.synchronize();
        }
        self.change(|books| {
            books.departed(&departure, moved.is_ok());
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
        // The stream is not named for this: what it is given otherwise is not ours.
        let end = Arc::new(stream.record()?);
        let mut tensors = self.tensors.iter();
        tensors.try_for_each(|tensor| tensor.pool().add_end(&end))
    }
}
