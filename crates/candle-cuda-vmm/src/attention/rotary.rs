//! The table of a rotary embedding.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::stream::check_device;
use crate::error::Result;
use candle_core::{DType, Error, Tensor};

/// The operation's name in errors.
const NAME: &str = "rotary";

/// The cosines and sines of a rotary embedding, for [`write`](super::write).
///
/// It rotates the first `rotary_dim` elements of each head, and leaves the others. By default
/// element `i` and element `i + rotary_dim / 2` are a pair, as for
/// [`rope`](candle_nn::rotary_emb::rope). With [`interleaved`](Self::interleaved), elements `2 · i`
/// and `2 · i + 1` are, as for [`rope_i`](candle_nn::rotary_emb::rope_i).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_cuda_vmm::attention::Rotary;
///
/// # fn main() -> candle_core::Result<()> {
/// let frequencies = Tensor::new(&[1f32, 0.1, 0.01, 0.001], &Device::Cpu)?;
/// let positions = Tensor::arange(0u32, 4096, &Device::Cpu)?.to_dtype(candle_core::DType::F32)?;
/// let angles = positions.unsqueeze(1)?.broadcast_mul(&frequencies.unsqueeze(0)?)?;
/// let rotary = Rotary::new(&angles.cos()?, &angles.sin()?)?;
/// assert_eq!((rotary.positions_max(), rotary.dim()), (4096, 8));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Rotary {
    pub(super) cos: Tensor,
    pub(super) sin: Tensor,
    pub(super) interleaved: bool,
}

impl Rotary {
    /// Makes a table from cosines and sines, F32 `[positions_max, rotary_dim / 2]` each,
    /// contiguous.
    ///
    /// # Errors
    /// [`CandleError`](crate::VmmError::CandleError) with `UnsupportedDTypeForOp`,
    /// `DeviceMismatchBinaryOp`, `UnexpectedNumberOfDims`, `ShapeMismatchBinaryOp`, `EmptyTensor`
    /// or `RequiresContiguous` if the tensors are not as above.
    pub fn new(cos: &Tensor, sin: &Tensor) -> Result<Self> {
        for tensor in [cos, sin] {
            if tensor.dtype() != DType::F32 {
                return Err(Error::UnsupportedDTypeForOp(tensor.dtype(), NAME).into());
            }
            if !tensor.is_contiguous() {
                return Err(Error::RequiresContiguous { op: NAME }.into());
            }
        }
        check_device(cos, sin, NAME)?;
        let (positions, half) = cos.dims2()?;
        if sin.dims2()? != (positions, half) {
            let (lhs, rhs) = (cos.shape().clone(), sin.shape().clone());
            return Err(Error::ShapeMismatchBinaryOp { lhs, rhs, op: NAME }.into());
        }
        if positions == 0 || half == 0 {
            return Err(Error::EmptyTensor { op: NAME }.into());
        }
        Ok(Self {
            cos: cos.clone(),
            sin: sin.clone(),
            interleaved: false,
        })
    }

    /// Makes neighbouring elements pairs, instead of the two halves.
    pub fn interleaved(mut self) -> Self {
        self.interleaved = true;
        self
    }

    /// Returns whether neighbouring elements are pairs.
    pub fn is_interleaved(&self) -> bool {
        self.interleaved
    }

    /// Returns the number of positions in the table.
    pub fn positions_max(&self) -> usize {
        self.cos.dims()[0]
    }

    /// Returns how many elements of each head are rotated.
    pub fn dim(&self) -> usize {
        2 * self.cos.dims()[1]
    }
}
