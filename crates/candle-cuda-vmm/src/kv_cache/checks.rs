//! Checks that all KV caches share.

use crate::error::Result;
use candle_core::{Error, Tensor};

/// Fails if `len` is more than the number of tokens.
pub(super) fn check_truncate(tokens: usize, len: usize) -> Result<()> {
    if len <= tokens {
        return Ok(());
    }
    Err(Error::NarrowInvalidArgs {
        shape: tokens.into(),
        dim: 0,
        start: 0,
        len,
        msg: "len is more than the number of tokens",
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

/// Appends, and restores the cache if that fails.
///
/// Candle's caches append keys before values. A clone of such a cache copies no tokens, and a
/// failed append writes behind the existing tokens only.
pub(super) fn append_or_restore<C: Clone>(
    cache: &mut C,
    append: impl FnOnce(&mut C) -> candle_core::Result<(Tensor, Tensor)>,
) -> Result<(Tensor, Tensor)> {
    let before = cache.clone();
    let outcome = append(cache);
    if outcome.is_err() {
        *cache = before;
    }
    Ok(outcome?)
}
