//! Launches the kernels of `kernels/linear.cu`.
//!
//! # Safety
//! The arguments are those of the kernels, in their order. A kernel reads tensors that stay borrowed
//! until it is queued, and whose sizes are checked: a row, the rows of contiguous weights, as many
//! factors as the row has elements, and as many elements that are added as there are outputs. It
//! writes to an output that was allocated here for exactly what it writes, and to shared memory of
//! the row's size.
#![allow(unsafe_code)]

use super::cuda::kernel;
use super::rms_norm::RmsNorm;
use crate::append::address_mut;
use crate::attention::cuda_addresses::{UNIT_BYTES, number, with_addresses, wrap};
use crate::attention::cuda_launch::launch;
use crate::kernels::{Kernel, LINEAR};
use candle_core::backend::BackendDevice;
use candle_core::cuda::WrapErr;
use candle_core::cuda::cudarc::driver::{DeviceRepr, LaunchConfig};
use candle_core::{Device, Result, Shape, Tensor};

/// Threads of a block: `THREADS` of the kernels.
const THREADS: usize = 256;
/// Outputs of a block, a warp each.
const BLOCK_OUTPUTS: usize = THREADS / 32;
/// Shared memory that a block has without asking for more.
const SHARED_BYTES_MAX: usize = 48 << 10;
/// Shared memory of a block beside the row: a sum of each warp.
const SUMS_BYTES: usize = BLOCK_OUTPUTS * size_of::<f32>();

/// `Arguments` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    x: u64,
    weight: u64,
    norm: u64,
    added: u64,
    output: u64,
    size: u32,
    outputs: u32,
    eps: f32,
}

// SAFETY: all fields are numbers, in C's layout.
unsafe impl DeviceRepr for Arguments {}

/// Returns the product; `None` if it is not that of one row on a GPU, or there is no kernel for it.
/// The inputs are checked.
pub fn linear(
    x: &Tensor,
    weight: &Tensor,
    norm: Option<RmsNorm<'_>>,
    added: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    let names = ["linear_f16", "linear_bf16", "linear_f32"];
    queue(names, x, weight, norm, added, weight.dims()[0])
}

/// The same of the gated product.
pub fn gated_linear(
    x: &Tensor,
    weight: &Tensor,
    norm: Option<RmsNorm<'_>>,
) -> Result<Option<Tensor>> {
    let names = ["gated_linear_f16", "gated_linear_bf16", "gated_linear_f32"];
    queue(names, x, weight, norm, None, weight.dims()[0] / 2)
}

fn queue(
    names: [&str; 3],
    x: &Tensor,
    weight: &Tensor,
    norm: Option<RmsNorm<'_>>,
    added: Option<&Tensor>,
    outputs: usize,
) -> Result<Option<Tensor>> {
    let Device::Cuda(device) = x.device() else {
        return Ok(None);
    };
    let factors = norm.map(|norm| norm.weight);
    // What is read 16 bytes at a time.
    let wide: Vec<_> = [x, weight].into_iter().chain(factors).collect();
    let size_bytes = x.dims()[1] * x.dtype().size_in_bytes();
    let is_one_row = x.dims()[0] == 1 && outputs > 0 && weight.is_contiguous();
    let fits = size_bytes.is_multiple_of(UNIT_BYTES)
        && (UNIT_BYTES..=SHARED_BYTES_MAX - SUMS_BYTES).contains(&size_bytes);
    if !is_one_row || !fits {
        return Ok(None);
    }
    let Some(kernel) = kernel(device, &LINEAR, x.dtype(), names)? else {
        return Ok(None);
    };
    // They gain nothing by beginning early, and the blocks that wait slow down those that work.
    let kernel = Kernel {
        overlaps: false,
        ..kernel
    };
    let stream = device.cuda_stream();
    let shape = Shape::from((1, outputs));
    // SAFETY: the kernel writes all of it before later work reads it.
    let mut storage = unsafe { device.alloc_uninit(&shape, x.dtype())? };
    let inputs: Vec<_> = wide.iter().copied().chain(added).collect();
    let is_queued = with_addresses(&stream, &inputs, |addresses| {
        let are_aligned = |address: &u64| address.is_multiple_of(UNIT_BYTES as u64);
        if !addresses[..wide.len()].iter().all(are_aligned) {
            return Ok(false);
        }
        let mut addresses = addresses.iter().copied();
        let mut next = |is_given: bool| {
            let address = is_given.then(|| addresses.next());
            address.flatten().unwrap_or(0)
        };
        let (output, _written) = address_mut(&mut storage.slice, &stream);
        let arguments = Arguments {
            x: next(true),
            weight: next(true),
            norm: next(norm.is_some()),
            added: next(added.is_some()),
            output,
            size: number(x.dims()[1])?,
            outputs: number(outputs)?,
            eps: norm.map_or(0., |norm| norm.eps),
        };
        let config = LaunchConfig {
            grid_dim: (number(outputs.div_ceil(BLOCK_OUTPUTS))?, 1, 1),
            block_dim: (number(THREADS)?, 1, 1),
            shared_mem_bytes: number(size_bytes)?,
        };
        // SAFETY: the module's: the kernel is for this dtype, and what it is given stays borrowed
        // until here.
        unsafe { launch(&kernel, &stream, config, &arguments) }.w()?;
        Ok(true)
    })?;
    Ok(is_queued.then(|| wrap(storage, shape)))
}
