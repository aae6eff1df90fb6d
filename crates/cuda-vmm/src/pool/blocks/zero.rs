//! Zeros over blocks that are backed anew.
//!
//! # Safety
//! The one unsafe call queues zeros over blocks that this call has made live and that the record
//! reserves for it, so no other call gives them up. The stream is named for all tensors and stays
//! so. What is freed of the blocks later retires behind a fence on it.
#![allow(unsafe_code)]

use super::BlockError;
use super::memory::BlockMemory;
use super::runs::Runs;
use crate::{Result, Stream};

impl BlockMemory {
    /// The stream on which these blocks will be zeroed, if any are to be.
    ///
    /// # Errors
    /// If it is being captured: the zeros would run when the graph does.
    pub(super) fn zeroing(&self, missing: &Runs) -> Result<Option<&Stream>> {
        let stream = self.zero_on_back.as_ref();
        let Some(stream) = stream.filter(|_| !missing.is_empty()) else {
            return Ok(None);
        };
        if stream.is_capturing()? {
            let blocks = missing.blocks().count();
            return Err(BlockError::CapturingZeros { blocks }.into());
        }
        Ok(Some(stream))
    }

    /// Queues zeros over blocks that are backed in all tensors now; or else gives them up again.
    pub(super) fn zero(&self, runs: &Runs, stream: &Stream) -> Result<()> {
        let zero = || {
            for tensor in &self.tensors {
                for run in runs.iter() {
                    let bytes = run.len() * tensor.block_bytes();
                    // SAFETY: the blocks are backed and reserved by this call, and what is freed of
                    // them later is unmapped behind the stream, as above.
                    unsafe { stream.memset(tensor.address(run.start), 0, bytes) }?;
                }
            }
            Ok(())
        };
        zero().inspect_err(|_| {
            // Some zeros may be queued, and the blocks are free for others after this. What cannot
            // be waited for on a context that is beyond use does not run either.
            let _ = stream.synchronize();
            self.give(runs);
        })
    }
}
