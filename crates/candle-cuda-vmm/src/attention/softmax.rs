//! The softmax between the two products: one launch, from F32 to the dtype of the second product,
//! with the soft cap and the mask.
//!
//! Candle's softmax uses one warp per row, which is slow for the few long rows of a decode step.
//! Its reductions take five launches, and one more to convert the dtype. The kernel here is in
//! `kernels/softmax.cu`.
//!
//! # Safety
//! The kernel reads and writes exactly the rows and elements of the slices that it is given.
#![allow(unsafe_code)]

use super::options::{GqaOptions, Mask};
use super::sizes::Sizes;
use crate::kernels;
use candle_core::cuda::WrapErr;
use candle_core::cuda::cudarc::driver::{
    CudaFunction, CudaSlice, DeviceRepr, LaunchConfig, PushKernelArg,
};
use candle_core::{CudaDevice, Error, Result};

/// Returns the kernel of this name; `None` if the driver does not load it.
pub(super) fn kernel(device: &CudaDevice, name: &str) -> Option<CudaFunction> {
    let function = kernels::SOFTMAX.function(device, name);
    let function =
        function.inspect_err(|error| tracing::debug!(%error, "Candle's softmax is used"));
    function.ok()
}

/// Queues the softmax over rows of one score for each key, to a new slice.
pub(super) fn softmax<T: DeviceRepr>(
    device: &CudaDevice,
    kernel: &CudaFunction,
    scores: &CudaSlice<f32>,
    sizes: &Sizes,
    options: &GqaOptions,
) -> Result<CudaSlice<T>> {
    let number = |number: usize| u32::try_from(number).map_err(Error::wrap);
    let rows = number(scores.len() / sizes.keys)?;
    let (length, queries) = (number(sizes.keys)?, number(sizes.queries)?);
    // The first query sees this many keys, and each next one `step` more.
    let (seen, step) = match options.mask {
        Mask::None => (length, 0_u32),
        Mask::Causal | Mask::Window(_) => (number(sizes.seen(options.mask, 0).end)?, 1),
    };
    let window = match options.mask {
        Mask::Window(window) => number(window.min(sizes.keys))?,
        Mask::None | Mask::Causal => length,
    };
    let cap = options.soft_cap.unwrap_or(0.);
    // SAFETY: the kernel writes all of it before anything reads it.
    let mut weights = unsafe { device.alloc::<T>(scores.len())? };
    let stream = device.cuda_stream();
    let mut launch = stream.launch_builder(kernel);
    launch.arg(scores).arg(&mut weights).arg(&length);
    launch.arg(&queries).arg(&seen).arg(&step);
    launch.arg(&window).arg(&cap);
    let config = LaunchConfig {
        grid_dim: (rows, 1, 1),
        // Whole warps, because the threads of a warp exchange values.
        block_dim: (length.min(1024).next_multiple_of(32), 1, 1),
        shared_mem_bytes: 0,
    };
    // SAFETY: the kernel is for this dtype, and both slices have `rows` rows of `length` elements.
    // No query sees more than `length` keys.
    unsafe { launch.launch(config) }.w()?;
    Ok(weights)
}
