//! Launches the decode kernels of `kernels/attention/`.
//!
//! # Safety
//! The arguments are those of the kernels, in their order ([`cuda_arguments`]). A kernel reads keys
//! within the capacity of a sequence and blocks that exist, whatever lengths and tables hold, at
//! addresses and strides of tensors that stay borrowed until it is queued. It writes to an output
//! that was allocated here for exactly what it writes, and to the plan's memory, which is large
//! enough ([`DecodePlan::check`]) and used by one stream.
//!
//! [`cuda_arguments`]: super::cuda_arguments
#![allow(unsafe_code)]

use super::cuda_addresses::{UNIT_BYTES, check_multiple, number, with_addresses, wrap};
use super::cuda_arguments::Cache;
use super::cuda_launch::launch;
use super::cuda_plan::Work;
use super::kv_batch::KvBatch;
use super::options::{GqaOptions, Mask};
use super::plan::DecodePlan;
use crate::append::address_mut;
use crate::error::VmmError;
use crate::kernels::{DECODE, Image};
use crate::order::StreamOrder;
use candle_core::backend::BackendDevice;
use candle_core::cuda::WrapErr;
use candle_core::cuda::cudarc::driver::{DeviceRepr, LaunchConfig};
use candle_core::{DType, Result, Shape, Tensor};

/// The sizes of heads of K and of V that there are kernels for. Others are padded to the next.
const HEADS: [(usize, usize); 6] = [
    (64, 64),
    (96, 96),
    (128, 128),
    (192, 128),
    (192, 192),
    (256, 256),
];

/// `Arguments` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    cache: Cache,
    queries: u64,
    output: u64,
    partials: u64,
    arrivals: u64,
    group: u32,
    window: u32,
    scale: f32,
    cap: f32,
    value_scale: f32,
}

// SAFETY: all fields are numbers, in C's layout.
unsafe impl DeviceRepr for Arguments {}

/// Computes the attention of one query for each sequence. `q` is contiguous, and so is `output` if
/// it is given.
pub fn decode(
    q: &Tensor,
    kv: &KvBatch,
    options: &GqaOptions,
    plan: &DecodePlan,
    output: Option<&Tensor>,
) -> Result<Tensor> {
    let device = q.device().as_cuda_device()?;
    let stream = device.cuda_stream();
    let q = &aligned(q)?;
    if let Some(output) = output {
        let queue = |addresses: &[u64]| {
            check_multiple(addresses[0] as usize, UNIT_BYTES)?;
            queue(q, kv, options, plan, addresses[0])
        };
        with_addresses(&stream, &[output], queue)?;
        return Ok(output.clone());
    }
    let shape = Shape::from((kv.batch(), q.dims()[1], kv.value_dim()));
    // SAFETY: the kernel writes all of it before later work reads it.
    let mut storage = unsafe { device.alloc_uninit(&shape, q.dtype())? };
    {
        let (output, _written) = address_mut(&mut storage.slice, &stream);
        queue(q, kv, options, plan, output)?;
    }
    Ok(wrap(storage, shape))
}

/// Returns the queries, or a copy if they do not begin where kernels can read them. Allocations do.
fn aligned(q: &Tensor) -> Result<Tensor> {
    let offset_bytes = q.layout().start_offset() * q.dtype().size_in_bytes();
    match offset_bytes.is_multiple_of(UNIT_BYTES) {
        true => Ok(q.clone()),
        false => q.force_contiguous(),
    }
}

/// Queues the kernel, which writes to `output`.
fn queue(
    q: &Tensor,
    kv: &KvBatch,
    options: &GqaOptions,
    plan: &DecodePlan,
    output: u64,
) -> Result<()> {
    let Some(on_device) = &plan.on_device else {
        return Err(VmmError::PlanOnAnotherDevice.into());
    };
    let (image, ((dim, value_dim), name)) = name_of(q.dtype(), kv)?;
    let device = q.device().as_cuda_device()?;
    let stream = device.cuda_stream();
    let kernel = on_device.kernel(device, image, &name)?;
    let query_heads = q.dims()[1];
    let group = query_heads / kv.kv_heads();
    let work = Work::new(kv, group);
    // The kernels count tiles in 32 bits, and round up to eight.
    number(work.items.saturating_mul(work.tiles).saturating_add(8))?;
    let shape = on_device.shape(&kernel, &work);
    let other = kv.device().as_cuda_device()?.cuda_stream();
    let order = StreamOrder::begin(&stream, &other)?;
    let others = [q, &on_device.partials, &on_device.arrivals];
    let queued = kv.with_cache(&stream, &others, UNIT_BYTES, |cache, addresses| {
        let arguments = Arguments {
            cache,
            queries: addresses[0],
            output,
            partials: addresses[1],
            arrivals: addresses[2],
            group: number(group)?,
            window: match options.mask {
                // A longer window sees all.
                Mask::Window(window) => u32::try_from(window).unwrap_or(0),
                Mask::None | Mask::Causal => 0,
            },
            // A bounded score is `cap * tanh(product * scale / cap)`.
            scale: options.scale * kv.scales[0] / options.soft_cap.unwrap_or(1.),
            cap: options.soft_cap.unwrap_or(0.),
            value_scale: kv.scales[1],
        };
        let config = LaunchConfig {
            grid_dim: (number(shape.blocks)?, 1, 1),
            block_dim: (number(32 * shape.warps)?, 1, 1),
            shared_mem_bytes: number(shape.shared_bytes(dim, value_dim))?,
        };
        // SAFETY: the module's: the kernel is for these dtypes and sizes, and what it is given
        // stays borrowed until here. If it overlaps, it begins by waiting for earlier kernels.
        unsafe { launch(&kernel, &stream, config, &arguments) }.w()
    });
    order.end().and(queued)
}

/// The padded sizes of heads, and the name of the kernel for them.
type Name = ((usize, usize), String);

/// Returns the kernel for these dtypes and sizes, and its image.
fn name_of(queries: DType, kv: &KvBatch) -> Result<(&'static Image, Name)> {
    let (dim, value_dim, dtype) = (kv.dim(), kv.value_dim(), kv.dtype());
    let unsupported = VmmError::UnsupportedHead {
        dim,
        value_dim,
        dtype,
    };
    let fits = |&&(k, v): &&(usize, usize)| dim <= k && value_dim <= v;
    let Some(&(k, v)) = HEADS.iter().find(fits) else {
        return Err(unsupported.into());
    };
    let (image, prefix) = match (dtype, queries) {
        (DType::F16, _) => (0, "f16"),
        (DType::BF16, _) => (1, "bf16"),
        (DType::F32, _) => (2, "f32"),
        (DType::F8E4M3, DType::F16) => (3, "f8_f16"),
        (DType::F8E4M3, DType::BF16) => (3, "f8_bf16"),
        _ => return Err(unsupported.into()),
    };
    Ok((&DECODE[image], ((k, v), format!("decode_{prefix}_{k}_{v}"))))
}
