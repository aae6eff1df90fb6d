//! Launches the kernels of `kernels/sample.cu`.
//!
//! # Safety
//! The arguments are those of the kernels, in their order. A kernel reads the rows of logits, and
//! the parameters of as many rows, in tensors that stay borrowed until it is queued; the shapes are
//! checked. It reads 16 bytes at a time only if all addresses are multiples of that. It writes one
//! token for each row to an output that was allocated here. Whatever the numbers are, it reads and
//! writes nothing else. It begins by waiting for earlier kernels, so it may be launched before they
//! have ended.
#![allow(unsafe_code)]

use super::SampleParameters;
use crate::append::address_mut;
use crate::attention::cuda_addresses::{number, with_addresses, wrap};
use crate::attention::cuda_launch::launch;
use crate::fused::cuda::{LANES, Rows, is_wide, pieces};
use crate::kernels::SAMPLE;
use candle_core::backend::BackendDevice;
use candle_core::cuda::WrapErr;
use candle_core::cuda::cudarc::driver::{DeviceRepr, LaunchConfig};
use candle_core::{DType, Result, Shape, Tensor};

/// `SampleArguments` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct SampleArguments {
    logits: Rows,
    temperature: u64,
    top_p: u64,
    seed: u64,
    position: u64,
    output: u64,
    size: u32,
    is_wide: u32,
}

// SAFETY: all fields are numbers, in C's layout.
unsafe impl DeviceRepr for SampleArguments {}

/// Returns the tokens. The inputs are checked, and have elements.
pub fn sample(logits: &Tensor, parameters: &SampleParameters) -> Result<Tensor> {
    let device = logits.device().as_cuda_device()?;
    let name = match logits.dtype() {
        DType::F16 => "sample_f16",
        DType::BF16 => "sample_bf16",
        _ => "sample_f32",
    };
    let kernel = SAMPLE.kernel(device, name).w()?;
    let stream = device.cuda_stream();
    let (batch, vocabulary) = logits.dims2()?;
    let shape = Shape::from(batch);
    // SAFETY: the kernel writes all of it before later work reads it.
    let mut tokens = unsafe { device.alloc_uninit(&shape, DType::U32)? };
    let SampleParameters {
        temperature,
        top_p,
        seed,
        position,
    } = parameters;
    let inputs = [logits, temperature, top_p, seed, position];
    with_addresses(&stream, &inputs, |addresses| {
        let (output, _written) = address_mut(&mut tokens.slice, &stream);
        let rows = Rows::new(addresses[0], logits);
        let is_wide = is_wide(logits.dtype(), vocabulary, &[rows]);
        let arguments = SampleArguments {
            logits: rows,
            temperature: addresses[1],
            top_p: addresses[2],
            seed: addresses[3],
            position: addresses[4],
            output,
            size: number(vocabulary)?,
            is_wide: is_wide.into(),
        };
        let threads_max = kernel.threads_max / LANES * LANES;
        let threads = pieces(logits.dtype(), vocabulary, is_wide).next_multiple_of(LANES);
        let config = LaunchConfig {
            grid_dim: (number(batch)?, 1, 1),
            block_dim: (number(threads.min(threads_max))?, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: the module's: the kernel is for this dtype, and what it is given stays borrowed
        // until here.
        unsafe { launch(&kernel, &stream, config, &arguments) }.w()
    })?;
    Ok(wrap(tokens, shape))
}
