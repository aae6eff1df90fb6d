//! Launches the kernels that copy rows of K and V, `kernels/attention/read.cu`.
//!
//! # Safety
//! The arguments are those of the kernels, in their order. A kernel reads rows within the capacity
//! of a sequence of the batch, in blocks that exist, and fills two outputs that were allocated here
//! for exactly these rows.
#![allow(unsafe_code)]

use super::cuda_addresses::{number, wrap};
use super::cuda_arguments::Cache;
use super::kv_batch::KvBatch;
use crate::append::address_mut;
use crate::kernels::READ;
use crate::order::StreamOrder;
use candle_core::backend::BackendDevice;
use candle_core::cuda::WrapErr;
use candle_core::cuda::cudarc::driver::{DeviceRepr, LaunchConfig, PushKernelArg};
use candle_core::{DType, Device, Error, Result, Shape, Tensor};
use std::ops::Range;

/// Threads per block.
const THREADS: u32 = 256;

/// `ReadArguments` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    cache: Cache,
    k: u64,
    v: u64,
    sequence: u32,
    first: u32,
}

// SAFETY: all fields are numbers, in C's layout.
unsafe impl DeviceRepr for Arguments {}

/// Returns copies of rows of K and of V of a sequence in a dtype, `[rows, kv_heads, dim]` and
/// `[rows, kv_heads, value_dim]`, on the stream of `device`. The rows are within its capacity.
pub fn read(
    kv: &KvBatch,
    sequence: usize,
    rows: &Range<usize>,
    dtype: DType,
    device: &Device,
) -> Result<[Tensor; 2]> {
    let device = device.as_cuda_device()?;
    let stream = device.cuda_stream();
    let shapes =
        [kv.dim(), kv.value_dim()].map(|dim| Shape::from((rows.len(), kv.kv_heads(), dim)));
    let name = match (kv.dtype(), dtype) {
        (DType::F8E4M3, DType::F16) => "read_f8_f16",
        (DType::F8E4M3, DType::BF16) => "read_f8_bf16",
        (DType::F16, DType::F16) => "read_f16",
        (DType::BF16, DType::BF16) => "read_bf16",
        (DType::F32, DType::F32) => "read_f32",
        (_, other) => return Err(Error::UnsupportedDTypeForOp(other, "prompt")),
    };
    let function = READ.function(device, name).w()?;
    // SAFETY: the kernel writes all of both before later work reads them.
    let (mut k, mut v) = unsafe {
        (
            device.alloc_uninit(&shapes[0], dtype)?,
            device.alloc_uninit(&shapes[1], dtype)?,
        )
    };
    let other = kv.device().as_cuda_device()?.cuda_stream();
    let order = StreamOrder::begin(&stream, &other)?;
    // It reads one element at a time.
    let required = kv.dtype().size_in_bytes();
    let queued = kv.with_cache(&stream, &[], required, |cache, _| {
        let (k, _k_written) = address_mut(&mut k.slice, &stream);
        let (v, _v_written) = address_mut(&mut v.slice, &stream);
        let arguments = Arguments {
            cache,
            k,
            v,
            sequence: number(sequence)?,
            first: number(rows.start)?,
        };
        let config = LaunchConfig {
            grid_dim: (number(rows.len())?, 1, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        let mut launch = stream.launch_builder(&function);
        launch.arg(&arguments);
        // SAFETY: the module's: the kernel is for these dtypes, and what it is given stays borrowed
        // until here.
        unsafe { launch.launch(config) }.w().map(drop)
    });
    order.end().and(queued)?;
    let [k_shape, v_shape] = shapes;
    Ok([wrap(k, k_shape), wrap(v, v_shape)])
}
