//! Checks that all KV caches share.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use crate::error::Result;
use candle_core::{Error, Tensor};

/// Fails if `len` is more than the number of tokens.
pub(super) fn check_truncate(tokens: usize, len: usize) -> Result<()> {
    check_tokens(tokens, len, "len is more than the number of tokens")
}

/// Fails if `released` is more than the number of tokens.
pub(super) fn check_release(tokens: usize, released: usize) -> Result<()> {
    check_tokens(
        tokens,
        released,
        "cannot release more tokens than there are",
    )
}

fn check_tokens(tokens: usize, len: usize, msg: &'static str) -> Result<()> {
    if len <= tokens {
        return Ok(());
    }
    Err(Error::NarrowInvalidArgs {
        shape: tokens.into(),
        dim: 0,
        start: 0,
        len,
        msg,
    }
    .into())
}

/// Returns how many of a cache's `tokens` tokens come before `position`, if `next` is the position
/// after the last. Fails if the cache cannot be truncated to that position.
pub(super) fn tokens_before(position: usize, next: usize, tokens: usize) -> Result<usize> {
    let first = next.saturating_sub(tokens);
    if (first..=next).contains(&position) {
        return Ok(position - first);
    }
    Err(Error::NarrowInvalidArgs {
        shape: next.into(),
        dim: 0,
        start: first,
        len: position,
        msg: "the position is not from the first token's to the one after the last",
    }
    .into())
}

/// Fails if keys and values differ in dtype, device or shape. The size of a head may differ.
pub(super) fn check_pair(
    k: &Tensor,
    v: &Tensor,
    dim: usize,
    op: &'static str,
) -> candle_core::Result<()> {
    if dim >= k.rank() {
        let dim = i32::try_from(dim).unwrap_or(i32::MAX);
        let shape = k.shape().clone();
        return Err(Error::DimOutOfRange { shape, dim, op });
    }
    if k.dtype() != v.dtype() {
        let (lhs, rhs) = (k.dtype(), v.dtype());
        return Err(Error::DTypeMismatchBinaryOp { lhs, rhs, op });
    }
    let (lhs, rhs) = (k.device().location(), v.device().location());
    if lhs != rhs {
        return Err(Error::DeviceMismatchBinaryOp { lhs, rhs, op });
    }
    // The last dimension is the size of a head, which may differ, unless it is the sequence.
    let last = k.rank() - usize::from(dim + 1 < k.rank());
    if k.rank() != v.rank() || k.dims()[..last] != v.dims()[..last] {
        let (lhs, rhs) = (k.shape().clone(), v.shape().clone());
        return Err(Error::ShapeMismatchBinaryOp { lhs, rhs, op });
    }
    Ok(())
}
