//! The norm before a product.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use candle_core::Tensor;

/// The norm of a product's input, as [`add_rms_norm`](super::add_rms_norm()) has it.
#[derive(Clone, Copy, Debug)]
pub struct RmsNorm<'a> {
    /// Factors of a row's elements, `[hidden]`.
    pub weight: &'a Tensor,
    /// What is added to the mean of the squares.
    pub eps: f32,
}
