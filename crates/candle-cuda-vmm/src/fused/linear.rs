//! Products with weights, and what a layer does right before and behind them.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::add_rms_norm::add_rms_norm;
use super::check::{check_alike, check_dtype, check_rows};
use super::rms_norm::RmsNorm;
use super::silu_mul::silu_mul;
use candle_core::{Error, Result, Tensor};

/// Returns `norm(x) · weightᵀ + added`: the product of rows with weights, as a linear layer without
/// bias has it. Without `norm`, `x` is multiplied as it is.
///
/// # Shapes
/// `x` is `[tokens, size]`, `weight` is `[outputs, size]`, and `added` is `[tokens, outputs]`, in
/// one dtype: F16, BF16 or F32. The elements of a row are side by side. The result is `[tokens,
/// outputs]`, contiguous.
///
/// # Numbers
/// The norm is rounded to the dtype. Of one row on a GPU the sum is computed in F32 and rounded
/// once, and equal inputs give equal bits. Otherwise the product is Candle's, is rounded, and is
/// rounded again with what is added.
///
/// # On a GPU
/// One row is multiplied by one launch with the feature `attention`, if rows begin and end at
/// multiples of 16 bytes and the row takes at most 48 KiB. It allocates only the result, and calls
/// nothing that waits. A decode step of one sequence is bound by reading the weights, and launches
/// of a norm or a sum take as long as a part of that. More rows are multiplied by Candle (cuBLAS),
/// which is as fast from two rows on. Weights that are parts of wider rows are copied first.
///
/// # Errors
/// Candle's errors, with `linear` as the operation if the error has one:
/// - `UnsupportedDTypeForOp`, `DTypeMismatchBinaryOp`, `DeviceMismatchBinaryOp`,
///   `UnexpectedNumberOfDims` and `ShapeMismatchBinaryOp` if a tensor is not as above.
/// - `RequiresContiguous` if the elements of a row are not side by side.
/// - `Cuda` if memory runs out or the launch fails.
pub fn linear(
    x: &Tensor,
    weight: &Tensor,
    norm: Option<RmsNorm<'_>>,
    added: Option<&Tensor>,
) -> Result<Tensor> {
    const NAME: &str = "linear";
    let outputs = check(x, weight, norm, NAME)?;
    if let Some(added) = added {
        check_alike(x, added, NAME)?;
        if added.dims2()? != (x.dim(0)?, outputs) {
            return Err(mismatch(weight, added, NAME));
        }
        check_rows(added, NAME)?;
    }
    #[cfg(feature = "attention")]
    if let Some(result) = super::cuda_linear::linear(x, weight, norm, added)? {
        return Ok(result);
    }
    let product = product(x, weight, norm)?;
    match added {
        Some(added) => product + added,
        None => Ok(product),
    }
}

/// Returns `silu(norm(x) · gateᵀ) · (norm(x) · upᵀ)`, of weights that have both: the gate, and below
/// it as many rows of up.
///
/// # Shapes
/// `x` is `[tokens, size]`, and `weight` is `[2 · n, size]`, as those of [`linear`]. The result is
/// `[tokens, n]`, contiguous.
///
/// # Numbers
/// Of one row on a GPU it is computed in F32 from the rounded norm, and rounded once. Otherwise the
/// products are rounded, as by [`linear`], and [`silu_mul`] rounds again.
///
/// # On a GPU
/// One launch for one row, as that of [`linear`], under the same conditions.
///
/// # Errors
/// Those of [`linear`], with `gated_linear` as the operation, and `UnexpectedShape` if the weights
/// have an odd number of rows.
pub fn gated_linear(x: &Tensor, weight: &Tensor, norm: Option<RmsNorm<'_>>) -> Result<Tensor> {
    const NAME: &str = "gated_linear";
    let both = check(x, weight, norm, NAME)?;
    if !both.is_multiple_of(2) {
        let size = x.dims()[1];
        return Err(Error::UnexpectedShape {
            msg: format!("{NAME} takes as much of up as of the gate"),
            expected: (both + 1, size).into(),
            got: weight.shape().clone(),
        });
    }
    #[cfg(feature = "attention")]
    if let Some(result) = super::cuda_linear::gated_linear(x, weight, norm)? {
        return Ok(result);
    }
    silu_mul(&product(x, weight, norm)?)
}

/// Checks what is multiplied, and returns how many elements a row of the product has.
fn check(
    x: &Tensor,
    weight: &Tensor,
    norm: Option<RmsNorm<'_>>,
    op: &'static str,
) -> Result<usize> {
    check_dtype(x, op)?;
    check_alike(x, weight, op)?;
    let ((_, size), (outputs, inner)) = (x.dims2()?, weight.dims2()?);
    if inner != size {
        return Err(mismatch(x, weight, op));
    }
    check_rows(x, op)?;
    check_rows(weight, op)?;
    if let Some(RmsNorm {
        weight: factors, ..
    }) = norm
    {
        check_alike(x, factors, op)?;
        if factors.dims1()? != size {
            return Err(mismatch(x, factors, op));
        }
        check_rows(factors, op)?;
    }
    Ok(outputs)
}

fn mismatch(left: &Tensor, right: &Tensor, op: &'static str) -> Error {
    let (lhs, rhs) = (left.shape().clone(), right.shape().clone());
    Error::ShapeMismatchBinaryOp { lhs, rhs, op }
}

/// The product by Candle, whose inputs are checked.
fn product(x: &Tensor, weight: &Tensor, norm: Option<RmsNorm<'_>>) -> Result<Tensor> {
    if x.elem_count() == 0 || weight.elem_count() == 0 {
        return Tensor::zeros((x.dim(0)?, weight.dim(0)?), x.dtype(), x.device());
    }
    let x = match norm {
        Some(RmsNorm { weight, eps }) => add_rms_norm(x, None, weight, eps)?.1,
        None => x.clone(),
    };
    // Candle multiplies no parts of wider rows.
    x.contiguous()?.matmul(&weight.contiguous()?.t()?)
}
