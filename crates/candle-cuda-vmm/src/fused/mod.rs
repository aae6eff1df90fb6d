//! What a layer of a Llama-shaped model does between its products, by one launch each on a GPU.
//!
//! A decode step launches a few kernels of weight and many small ones, each of which takes longer
//! to begin than to run. [`add_rms_norm`] adds to the residual stream and normalizes the sum, and
//! [`silu_mul`] joins gate and up. [`linear`] and [`gated_linear`] do such things within a product,
//! which is faster for one row.
//!
//! Inputs may be parts of wider rows, so the products before them can be joined too: `narrow` the
//! result of one product with the weights of several.
//!
//! ```
//! use candle_core::{Device, Result, Tensor};
//! use candle_cuda_vmm::fused::{add_rms_norm, silu_mul};
//!
//! # fn main() -> Result<()> {
//! let random = |shape: (usize, usize)| Tensor::randn(0f32, 1., shape, &Device::Cpu);
//! let (x, mixed) = (random((3, 64))?, random((3, 64))?);
//! let (gate_up, down) = (random((2 * 96, 64))?, random((64, 96))?);
//! let weight = Tensor::ones(64, x.dtype(), &Device::Cpu)?;
//!
//! // The residual stream after attention, and what the feed-forward part gets of it.
//! let (x, normed) = add_rms_norm(&x, Some(&mixed), &weight, 1e-5)?;
//! let gated = silu_mul(&normed.matmul(&gate_up.t()?)?)?;
//! // The next layer begins by adding this.
//! let delta = gated.matmul(&down.t()?)?;
//! assert_eq!((x.dims(), gated.dims(), delta.dims()), (&[3, 64][..], &[3, 96][..], &[3, 64][..]));
//! # Ok(())
//! # }
//! ```
//!
//! No gradient flows through these functions.

mod add_rms_norm;
pub(crate) mod check;
pub(crate) mod cpu;
#[cfg(feature = "attention")]
pub(crate) mod cuda;
#[cfg(feature = "attention")]
mod cuda_linear;
mod linear;
mod rms_norm;
mod silu_mul;

pub use add_rms_norm::add_rms_norm;
pub use linear::{gated_linear, linear};
pub use rms_norm::RmsNorm;
pub use silu_mul::silu_mul;
