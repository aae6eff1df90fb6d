//! Multiplies gate and up.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::check::{check_dtype, check_rows};
use super::cpu;
use candle_core::{D, Device, Error, Result, Tensor};

/// The operation's name in errors.
const NAME: &str = "silu_mul";

/// Returns `silu(gate) · up`, where `silu(x) = x / (1 + exp(-x))`, of rows that have both: the gate,
/// and behind it as many elements of up.
///
/// # Shapes
/// `gate_up` is `[tokens, 2 · n]` in F16, BF16 or F32. The elements of a row are side by side, and
/// rows may have any stride. The result is `[tokens, n]` in that dtype, contiguous.
///
/// # Numbers
/// It is computed in F32 and rounded once. Candle's `silu` rounds before the product, so results in
/// F16 and BF16 may differ from its by a rounding. They are within a rounding and 1e-5 of double
/// precision, relative to the number. Equal inputs give equal bits on one device.
///
/// # On a GPU
/// With the feature `attention` it is one launch on the device's stream, which calls nothing that
/// waits, and allocates only the result. Without the feature, or if the driver does not load its
/// kernels, it is Candle's `silu` and product, which round twice.
///
/// # Errors
/// Candle's errors:
/// - `UnsupportedDTypeForOp` with `silu_mul` as the operation, and `UnexpectedNumberOfDims`.
/// - `UnexpectedShape` if the rows have an odd number of elements.
/// - `RequiresContiguous` if the elements of a row are not side by side.
/// - `Cuda` if memory runs out or the launch fails.
pub fn silu_mul(gate_up: &Tensor) -> Result<Tensor> {
    check_dtype(gate_up, NAME)?;
    let (tokens, both) = gate_up.dims2()?;
    if !both.is_multiple_of(2) {
        return Err(Error::UnexpectedShape {
            msg: format!("{NAME} takes as much of up as of the gate"),
            expected: (tokens, both + 1).into(),
            got: gate_up.shape().clone(),
        });
    }
    check_rows(gate_up, NAME)?;
    if gate_up.elem_count() == 0 {
        return Tensor::zeros((tokens, both / 2), gate_up.dtype(), gate_up.device());
    }
    match gate_up.device() {
        Device::Cpu => cpu::silu_mul(gate_up),
        #[cfg(feature = "attention")]
        Device::Cuda(_) => match super::cuda::silu_mul(gate_up)? {
            Some(result) => Ok(result),
            None => by_candle(gate_up),
        },
        _ => by_candle(gate_up),
    }
}

/// The same by Candle's operations.
fn by_candle(gate_up: &Tensor) -> Result<Tensor> {
    let size = gate_up.dim(D::Minus1)? / 2;
    let half = |at: usize| gate_up.narrow(D::Minus1, at * size, size);
    half(0)?.silu()? * half(1)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candles_operations_have_the_same_numbers() -> Result<()> {
        let wide = Tensor::randn(0f32, 3., (3, 100), &Device::Cpu)?;
        let gate_up = wide.narrow(1, 20, 70)?;
        let off = (silu_mul(&gate_up)? - by_candle(&gate_up)?)?.abs()?;
        assert!(off.max_all()?.to_scalar::<f32>()? < 1e-5);
        Ok(())
    }
}
