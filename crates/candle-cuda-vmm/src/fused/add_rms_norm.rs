//! Adds to the residual stream, and normalizes the sum.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::check::{check_alike, check_dtype, check_rows};
use super::cpu;
use candle_core::{Device, Error, Result, Tensor};

/// The operation's name in errors.
const NAME: &str = "add_rms_norm";

/// Adds `delta` to `x`, and returns the sum and its RMS norm: `sum / sqrt(mean(sum²) + eps) ·
/// weight` for each row. Without `delta` the sum is `x` itself.
///
/// # Shapes
/// `x` and `delta` are `[tokens, hidden]`, and `weight` is `[hidden]`, in one dtype: F16, BF16 or
/// F32. The elements of a row are side by side, and rows may have any stride, so `narrow` of wider
/// rows works without a copy. Both results are `[tokens, hidden]` in that dtype, contiguous; without
/// `delta` the first is `x` with its strides, and shares its memory.
///
/// # Numbers
/// The sum is rounded to the dtype, and the norm is that of the rounded sum. It is computed in F32
/// and rounded once, as by Candle's `rms_norm` on a GPU. (On the CPU Candle rounds after each step.)
/// So the norm is within a rounding and 1e-5 of double precision, relative to the number.
///
/// A row's result does not depend on other rows. Equal inputs give equal bits on one device, if
/// rows begin at a multiple of 16 bytes in both cases, or in neither: sums are in another order
/// then.
///
/// # On a GPU
/// With the feature `attention` it is one launch on the device's stream, which calls nothing that
/// waits, and allocates only the results. Without the feature, or if the driver does not load its
/// kernels, it is Candle's addition and `rms_norm`.
///
/// # Errors
/// Candle's errors, with `add_rms_norm` as the operation if the error has one:
/// - `UnsupportedDTypeForOp`, `DTypeMismatchBinaryOp`, `DeviceMismatchBinaryOp`,
///   `UnexpectedNumberOfDims` and `ShapeMismatchBinaryOp` if a tensor is not as above.
/// - `RequiresContiguous` if the elements of a row, or those of `weight`, are not side by side.
/// - `Cuda` if memory runs out or the launch fails.
pub fn add_rms_norm(
    x: &Tensor,
    delta: Option<&Tensor>,
    weight: &Tensor,
    eps: f32,
) -> Result<(Tensor, Tensor)> {
    check_dtype(x, NAME)?;
    for other in delta.into_iter().chain([weight]) {
        check_alike(x, other, NAME)?;
    }
    let (_, hidden) = x.dims2()?;
    let mismatch = |other: &Tensor| {
        let (lhs, rhs) = (x.shape().clone(), other.shape().clone());
        Err(Error::ShapeMismatchBinaryOp { lhs, rhs, op: NAME })
    };
    if let Some(delta) = delta {
        delta.dims2()?;
        if delta.dims() != x.dims() {
            return mismatch(delta);
        }
    }
    if weight.dims1()? != hidden {
        return mismatch(weight);
    }
    for input in [x, weight].into_iter().chain(delta) {
        check_rows(input, NAME)?;
    }
    if x.elem_count() == 0 {
        return Ok((x.clone(), x.zeros_like()?));
    }
    match x.device() {
        Device::Cpu => cpu::add_rms_norm(x, delta, weight, eps),
        #[cfg(feature = "attention")]
        Device::Cuda(_) => match super::cuda::add_rms_norm(x, delta, weight, eps)? {
            Some(results) => Ok(results),
            None => by_candle(x, delta, weight, eps),
        },
        _ => by_candle(x, delta, weight, eps),
    }
}

/// The same by Candle's operations.
fn by_candle(
    x: &Tensor,
    delta: Option<&Tensor>,
    weight: &Tensor,
    eps: f32,
) -> Result<(Tensor, Tensor)> {
    let sum = match delta {
        Some(delta) => (x + delta)?,
        None => x.clone(),
    };
    let normed = candle_nn::ops::rms_norm(&sum.contiguous()?, weight, eps)?;
    Ok((sum, normed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candles_operations_have_the_same_numbers() -> Result<()> {
        let random = |shape: &[usize]| Tensor::randn(0f32, 1., shape, &Device::Cpu);
        let (x, weight) = (random(&[3, 100])?.narrow(1, 20, 70)?, random(&[70])?);
        let off = |ours: &Tensor, theirs: &Tensor| {
            let off = (ours - theirs)?.abs()?;
            off.max_all()?.to_scalar::<f32>()
        };
        for delta in [None, Some(random(&[3, 70])?)] {
            let ours = add_rms_norm(&x, delta.as_ref(), &weight, 1e-5)?;
            let theirs = by_candle(&x, delta.as_ref(), &weight, 1e-5)?;
            assert_eq!(off(&ours.0, &theirs.0)?, 0.);
            assert!(off(&ours.1, &theirs.1)? < 1e-5);
        }
        Ok(())
    }
}
