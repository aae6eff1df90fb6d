//! Launches the kernels of `kernels/fused.cu`.
//!
//! # Safety
//! The arguments are those of the kernels, in their order. A kernel reads the rows of tensors that
//! stay borrowed until it is queued, by their strides, and 16 bytes at a time only if all addresses
//! are multiples of that. It writes to outputs that were allocated here for exactly what it writes.
//! It begins by waiting for earlier kernels, so it may be launched before they have ended.
#![allow(unsafe_code)]

use crate::append::address_mut;
use crate::attention::cuda_addresses::{UNIT_BYTES, number, with_addresses, wrap};
use crate::attention::cuda_launch::launch;
use crate::kernels::{FUSED, Image, Kernel};
use candle_core::backend::BackendDevice;
use candle_core::cuda::WrapErr;
use candle_core::cuda::cudarc::driver::sys::CUresult;
use candle_core::cuda::cudarc::driver::{DeviceRepr, DriverError, LaunchConfig};
use candle_core::{CudaDevice, DType, Result, Shape, Tensor};

/// Pieces of a row that a thread keeps in registers: `HELD` of the kernels.
const HELD: usize = 2;
/// Threads of a warp.
pub const LANES: usize = 32;
/// Threads of a block that multiplies gate and up.
const GATED_THREADS: usize = 256;
/// The most blocks of a row. They take its pieces in turn.
const GATED_BLOCKS_MAX: usize = 1024;

/// `Rows` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Rows {
    first: u64,
    stride: u64,
}

impl Rows {
    pub fn new(first: u64, tensor: &Tensor) -> Self {
        Self {
            first,
            stride: tensor.stride()[0] as u64,
        }
    }
}

/// `NormArguments` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct NormArguments {
    x: Rows,
    delta: Rows,
    weight: u64,
    sum: u64,
    output: u64,
    size: u32,
    is_wide: u32,
    eps: f32,
}

/// `GatedArguments` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct GatedArguments {
    gate_up: Rows,
    output: u64,
    size: u32,
    is_wide: u32,
}

// SAFETY: all fields are numbers, in C's layout.
unsafe impl DeviceRepr for NormArguments {}
// SAFETY: all fields are numbers, in C's layout.
unsafe impl DeviceRepr for GatedArguments {}

/// Returns the sum and its norm; `None` if there is no kernel. The inputs are checked, and have
/// elements.
pub fn add_rms_norm(
    x: &Tensor,
    delta: Option<&Tensor>,
    weight: &Tensor,
    eps: f32,
) -> Result<Option<(Tensor, Tensor)>> {
    let device = x.device().as_cuda_device()?;
    let names = ["add_rms_norm_f16", "add_rms_norm_bf16", "add_rms_norm_f32"];
    let Some(kernel) = kernel(device, &FUSED, x.dtype(), names)? else {
        return Ok(None);
    };
    let stream = device.cuda_stream();
    let (shape, (tokens, size)) = (x.shape().clone(), x.dims2()?);
    // SAFETY: the kernel writes all of it before later work reads it.
    let output = || unsafe { device.alloc_uninit(&shape, x.dtype()) };
    let (mut normed, mut sum) = (output()?, delta.map(|_| output()).transpose()?);
    let inputs: Vec<_> = [x, weight].into_iter().chain(delta).collect();
    with_addresses(&stream, &inputs, |addresses| {
        let (output, _normed_written) = address_mut(&mut normed.slice, &stream);
        let sum = sum.as_mut().map(|sum| address_mut(&mut sum.slice, &stream));
        let x_rows = Rows::new(addresses[0], x);
        let delta_rows = delta.map_or_else(Rows::default, |it| Rows::new(addresses[2], it));
        let sum_address = sum.as_ref().map_or(0, |(address, _)| *address);
        let is_wide = is_wide(x.dtype(), size, &[x_rows, delta_rows])
            && [addresses[1], output, sum_address].iter().all(is_aligned);
        let arguments = NormArguments {
            x: x_rows,
            delta: delta_rows,
            weight: addresses[1],
            sum: sum_address,
            output,
            size: number(size)?,
            is_wide: is_wide.into(),
            eps,
        };
        let pieces = pieces(x.dtype(), size, is_wide);
        let threads_max = kernel.threads_max / LANES * LANES;
        let threads = pieces.div_ceil(HELD).next_multiple_of(LANES);
        let config = LaunchConfig {
            grid_dim: (number(tokens)?, 1, 1),
            block_dim: (number(threads.min(threads_max))?, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: the module's: the kernel is for this dtype, and what it is given stays borrowed
        // until here.
        unsafe { launch(&kernel, &stream, config, &arguments) }.w()
    })?;
    let sum = sum.map_or_else(|| x.clone(), |sum| wrap(sum, shape.clone()));
    Ok(Some((sum, wrap(normed, shape))))
}

/// Returns the product of up and the gate's silu; `None` if there is no kernel. The input is
/// checked, and has elements.
pub fn silu_mul(gate_up: &Tensor) -> Result<Option<Tensor>> {
    let device = gate_up.device().as_cuda_device()?;
    let dtype = gate_up.dtype();
    let names = ["silu_mul_f16", "silu_mul_bf16", "silu_mul_f32"];
    let Some(kernel) = kernel(device, &FUSED, dtype, names)? else {
        return Ok(None);
    };
    let stream = device.cuda_stream();
    let (tokens, both) = gate_up.dims2()?;
    let size = both / 2;
    let shape = Shape::from((tokens, size));
    // SAFETY: the kernel writes all of it before later work reads it.
    let mut storage = unsafe { device.alloc_uninit(&shape, dtype)? };
    with_addresses(&stream, &[gate_up], |addresses| {
        let (output, _written) = address_mut(&mut storage.slice, &stream);
        let rows = Rows::new(addresses[0], gate_up);
        let is_wide = is_wide(dtype, size, &[rows]) && is_aligned(&output);
        let arguments = GatedArguments {
            gate_up: rows,
            output,
            size: number(size)?,
            is_wide: is_wide.into(),
        };
        let blocks = pieces(dtype, size, is_wide).div_ceil(GATED_THREADS);
        let config = LaunchConfig {
            grid_dim: (number(tokens)?, number(blocks.min(GATED_BLOCKS_MAX))?, 1),
            block_dim: (number(GATED_THREADS)?, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: the module's: the kernel is for this dtype, and what it is given stays borrowed
        // until here.
        unsafe { launch(&kernel, &stream, config, &arguments) }.w()
    })?;
    Ok(Some(wrap(storage, shape)))
}

/// Returns the kernel of an image for a dtype, by its names for F16, BF16 and F32; `None` if the
/// driver does not load it.
pub fn kernel(
    device: &CudaDevice,
    image: &'static Image,
    dtype: DType,
    [f16, bf16, f32]: [&str; 3],
) -> Result<Option<Kernel>> {
    use CUresult::{
        CUDA_ERROR_INVALID_IMAGE, CUDA_ERROR_INVALID_PTX, CUDA_ERROR_JIT_COMPILER_NOT_FOUND,
        CUDA_ERROR_NO_BINARY_FOR_GPU, CUDA_ERROR_NOT_SUPPORTED, CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
    };
    let name = match dtype {
        DType::F16 => f16,
        DType::BF16 => bf16,
        _ => f32,
    };
    match image.kernel(device, name) {
        Err(
            error @ DriverError(
                CUDA_ERROR_INVALID_IMAGE
                | CUDA_ERROR_INVALID_PTX
                | CUDA_ERROR_JIT_COMPILER_NOT_FOUND
                | CUDA_ERROR_NO_BINARY_FOR_GPU
                | CUDA_ERROR_NOT_SUPPORTED
                | CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
            ),
        ) => {
            tracing::debug!(%error, "Candle's operations are used");
            Ok(None)
        }
        kernel => kernel.map(Some).w(),
    }
}

fn is_aligned(address: &u64) -> bool {
    address.is_multiple_of(UNIT_BYTES as u64)
}

/// Returns whether parts of rows, of this many elements, begin and end at multiples of 16 bytes.
pub fn is_wide(dtype: DType, size: usize, rows: &[Rows]) -> bool {
    let bytes = |elements: u64| elements * dtype.size_in_bytes() as u64;
    let are_aligned = |rows: &Rows| is_aligned(&rows.first) && is_aligned(&bytes(rows.stride));
    is_aligned(&bytes(size as u64)) && rows.iter().all(are_aligned)
}

/// Returns the pieces of a part of a row with this many elements.
pub fn pieces(dtype: DType, size: usize, is_wide: bool) -> usize {
    match is_wide {
        true => size * dtype.size_in_bytes() / UNIT_BYTES,
        false => size,
    }
}
