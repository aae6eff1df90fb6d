//! What inputs have to be. An operation's name goes into its errors.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use crate::attention::stream::check_device;
use candle_core::{DType, Error, Result, Tensor};

/// Fails unless the dtype is one of those supported.
pub fn check_dtype(tensor: &Tensor, op: &'static str) -> Result<()> {
    match tensor.dtype() {
        DType::F16 | DType::BF16 | DType::F32 => Ok(()),
        other => Err(Error::UnsupportedDTypeForOp(other, op)),
    }
}

/// Fails unless two tensors have one dtype and are on one device.
pub fn check_alike(left: &Tensor, right: &Tensor, op: &'static str) -> Result<()> {
    let (lhs, rhs) = (left.dtype(), right.dtype());
    if lhs != rhs {
        return Err(Error::DTypeMismatchBinaryOp { lhs, rhs, op });
    }
    check_device(left, right, op)
}

/// Fails unless the elements of each row are side by side. Rows may be anywhere.
pub fn check_rows(tensor: &Tensor, op: &'static str) -> Result<()> {
    let (size, stride) = (tensor.dims().last(), tensor.stride().last());
    match size.is_none_or(|size| *size <= 1) || stride == Some(&1) {
        true => Ok(()),
        false => Err(Error::RequiresContiguous { op }),
    }
}
