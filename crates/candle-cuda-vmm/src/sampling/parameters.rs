//! What the tokens of a batch are drawn with.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::NAME;
use crate::attention::stream::check_device;
use candle_core::{DType, Error, Result, Shape, Tensor};

/// What each row of logits is drawn with, in device memory.
///
/// It shares the memory of the tensors that it is made of. So write to those
/// ([`Tensor::slice_set`]) what the next step is to use. [The module](super) says what the numbers
/// mean.
#[derive(Clone, Debug)]
pub struct SampleParameters {
    pub(super) temperature: Tensor,
    pub(super) top_p: Tensor,
    pub(super) seed: Tensor,
    pub(super) position: Tensor,
}

impl SampleParameters {
    /// Takes temperatures and `top_p`, F32 `[batch]`; seeds of 64 bits, the low half first, U32
    /// `[batch, 2]`; and positions, U32 `[batch]`. All are contiguous and on one device.
    ///
    /// # Errors
    /// Candle's errors: `UnexpectedNumberOfDims` for temperatures, and for the others
    /// `UnexpectedDType`, `UnexpectedShape`, and with `sample` as the operation
    /// `DeviceMismatchBinaryOp` and `RequiresContiguous`, if a tensor is not as above.
    pub fn new(
        temperature: &Tensor,
        top_p: &Tensor,
        seed: &Tensor,
        position: &Tensor,
    ) -> Result<Self> {
        let batch = temperature.dims1()?;
        let rows = Shape::from(batch);
        let wanted = [
            ("temperature", temperature, DType::F32, rows.clone()),
            ("top_p", top_p, DType::F32, rows.clone()),
            ("seed", seed, DType::U32, (batch, 2).into()),
            ("position", position, DType::U32, rows),
        ];
        for (msg, tensor, dtype, shape) in wanted {
            if tensor.dtype() != dtype {
                return Err(Error::UnexpectedDType {
                    msg,
                    expected: dtype,
                    got: tensor.dtype(),
                });
            }
            if *tensor.shape() != shape {
                return Err(Error::UnexpectedShape {
                    msg: msg.to_owned(),
                    expected: shape,
                    got: tensor.shape().clone(),
                });
            }
            check_device(temperature, tensor, NAME)?;
            if !tensor.is_contiguous() {
                return Err(Error::RequiresContiguous { op: NAME });
            }
        }
        Ok(Self {
            temperature: temperature.clone(),
            top_p: top_p.clone(),
            seed: seed.clone(),
            position: position.clone(),
        })
    }

    /// Returns the number of rows.
    pub fn batch(&self) -> usize {
        self.temperature.elem_count()
    }

    /// Returns those of the first rows, for a step of a smaller batch. They share memory with
    /// these.
    ///
    /// # Errors
    /// Candle's `NarrowInvalidArgs` if there are fewer rows.
    pub fn first(&self, batch: usize) -> Result<Self> {
        Ok(Self {
            temperature: self.temperature.narrow(0, 0, batch)?,
            top_p: self.top_p.narrow(0, 0, batch)?,
            seed: self.seed.narrow(0, 0, batch)?,
            position: self.position.narrow(0, 0, batch)?,
        })
    }
}
