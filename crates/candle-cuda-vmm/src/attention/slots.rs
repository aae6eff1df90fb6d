//! The rows that new tokens are written to.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use candle_core::Tensor;

/// The rows that [`write`](super::write) writes tokens to.
#[derive(Clone, Copy, Debug)]
pub enum Slots<'a> {
    /// Token `i` is the last token of sequence `i`: its row is `lengths[i] - 1`. There are as many
    /// tokens as sequences. The token of a sequence whose length is 0 is not written; its
    /// position must be one that the rotary table has. For decode steps.
    Last,
    /// Token `i` is row `rows[i]` of sequence `sequences[i]`: any rows, for prompts. No row may be
    /// named twice.
    At {
        /// The sequence of each token, counted from 0: U32 `[tokens]`, contiguous.
        sequences: &'a Tensor,
        /// The row of each token, counted from 0: U32 `[tokens]`, contiguous.
        rows: &'a Tensor,
    },
}
