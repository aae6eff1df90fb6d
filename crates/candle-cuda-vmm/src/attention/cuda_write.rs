//! Launches the kernels that rotate and write new tokens, `kernels/attention/write.cu`.
//!
//! # Safety
//! The arguments are those of the kernels, in their order. A kernel reads tensors that stay
//! borrowed until it is queued, by their strides. It writes rows within the capacity of existing
//! sequences, in blocks that exist, and skips others. It writes to an output that was allocated
//! here for exactly what it writes.
#![allow(unsafe_code)]

use super::cuda_addresses::{UNIT_BYTES, number, wrap};
use super::cuda_arguments::Cache;
use super::cuda_launch::launch;
use super::kv_batch::KvBatch;
use super::rotary::Rotary;
use super::slots::Slots;
use crate::append::address_mut;
use crate::kernels::WRITE;
use crate::order::StreamOrder;
use candle_core::backend::BackendDevice;
use candle_core::cuda::WrapErr;
use candle_core::cuda::cudarc::driver::{DeviceRepr, LaunchConfig};
use candle_core::{DType, Error, Result, Tensor};

/// Threads per block.
const THREADS: u32 = 256;
/// Heads per block: each has a warp.
const BLOCK_HEADS: u32 = THREADS / 32;

/// `Heads` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Heads {
    first: u64,
    token_stride: u64,
    head_stride: u64,
}

/// `WriteArguments` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    cache: Cache,
    q: Heads,
    k: Heads,
    v: Heads,
    output: u64,
    cos: u64,
    sin: u64,
    positions: u64,
    sequences: u64,
    rows: u64,
    query_heads: u32,
    positions_max: u32,
    rotary_dim: u32,
    interleaved: u32,
    k_scale: f32,
    v_scale: f32,
}

// SAFETY: all fields are numbers, in C's layout.
unsafe impl DeviceRepr for Arguments {}

/// Rotates and writes new tokens, and returns the rotated queries.
pub fn write(
    new: [&Tensor; 3],
    rotary: Option<(&Rotary, &Tensor)>,
    kv: &KvBatch,
    slots: Slots<'_>,
) -> Result<Tensor> {
    let shape = new[0].shape().clone();
    let (tokens, query_heads, _) = new[0].dims3()?;
    let device = new[0].device().as_cuda_device()?;
    let stream = device.cuda_stream();
    // SAFETY: the kernel writes all of it before later work reads it.
    let mut output = unsafe { device.alloc_uninit(&shape, new[0].dtype())? };
    if tokens == 0 {
        return Ok(wrap(output, shape));
    }
    let [q, k, v] = new.map(with_contiguous_heads);
    let new = [&q?, &k?, &v?];
    let name = match (new[0].dtype(), kv.dtype()) {
        (DType::F16, DType::F8E4M3) => "write_f8_f16",
        (DType::BF16, DType::F8E4M3) => "write_f8_bf16",
        (DType::F16, _) => "write_f16",
        (DType::BF16, _) => "write_bf16",
        (DType::F32, _) => "write_f32",
        (other, _) => return Err(Error::UnsupportedDTypeForOp(other, "write")),
    };
    let kernel = WRITE.kernel(device, name).w()?;
    let mut inputs = new.to_vec();
    if let Some((rotary, positions)) = rotary {
        inputs.extend([&rotary.cos, &rotary.sin, positions]);
    }
    if let Slots::At { sequences, rows } = slots {
        inputs.extend([sequences, rows]);
    }
    let other = kv.device().as_cuda_device()?.cuda_stream();
    let order = StreamOrder::begin(&stream, &other)?;
    let queued = kv.with_cache(&stream, &inputs, UNIT_BYTES, |cache, addresses| {
        let (output, _written) = address_mut(&mut output.slice, &stream);
        let heads = |at: usize| Heads {
            first: addresses[at],
            token_stride: new[at].stride()[0] as u64,
            head_stride: new[at].stride()[1] as u64,
        };
        let mut rest = addresses[3..].iter().copied();
        let mut next = |is_given: bool| match is_given {
            true => rest.next().unwrap_or_default(),
            false => 0,
        };
        let (is_rotated, has_rows) = (rotary.is_some(), matches!(slots, Slots::At { .. }));
        let arguments = Arguments {
            cache,
            q: heads(0),
            k: heads(1),
            v: heads(2),
            output,
            cos: next(is_rotated),
            sin: next(is_rotated),
            positions: next(is_rotated),
            sequences: next(has_rows),
            rows: next(has_rows),
            query_heads: number(query_heads)?,
            positions_max: number(rotary.map_or(0, |(rotary, _)| rotary.positions_max()))?,
            rotary_dim: number(rotary.map_or(0, |(rotary, _)| rotary.dim()))?,
            interleaved: u32::from(rotary.is_some_and(|(rotary, _)| rotary.is_interleaved())),
            k_scale: kv.scales[0],
            v_scale: kv.scales[1],
        };
        let heads = number(query_heads + 2 * kv.kv_heads())?;
        let config = LaunchConfig {
            grid_dim: (number(tokens)?, heads.div_ceil(BLOCK_HEADS), 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: the module's: the kernel is for these dtypes, and what it is given stays borrowed
        // until here. It begins by waiting for earlier kernels.
        unsafe { launch(&kernel, &stream, config, &arguments) }.w()
    });
    let ended = order.end();
    queued?;
    ended?;
    Ok(wrap(output, shape))
}

/// Returns the tensor, or a copy if the elements of a head are not side by side.
fn with_contiguous_heads(tensor: &Tensor) -> Result<Tensor> {
    match tensor.stride()[2] {
        1 => Ok(tensor.clone()),
        _ => tensor.force_contiguous(),
    }
}
