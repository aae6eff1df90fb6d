//! What decode kernels need beside their inputs: how many thread blocks, and memory for what they
//! have of an item until it is joined.
//!
//! # Safety
//! The partial results have two slots for each thread block, and there is an arrival count for each
//! item. Kernels of one stream use them one after the other, and each leaves the counts at 0.
#![allow(unsafe_code)]

use super::cuda_addresses::{UNIT_BYTES, number};
use crate::error::{Result, VmmError};
use crate::kernels::Image;
use candle_core::backend::BackendDevice;
use candle_core::cuda::WrapErr;
use candle_core::cuda::cudarc::driver::CudaFunction;
use candle_core::cuda::cudarc::driver::sys::{
    CUdevice_attribute as Attribute, CUfunction_attribute,
};
use candle_core::op::BackpropOp;
use candle_core::{DType, Device, Shape, Storage, Tensor};
use std::sync::{Mutex, PoisonError};

/// Query heads of an item: `HEADS` of the kernels.
const HEADS: usize = 8;
/// Thread blocks that a launch may have: `BLOCKS_MAX` of the kernels.
const BLOCKS_MAX: usize = 320;
/// Keys of a tile: `TILE` of the kernels.
const TILE: usize = 16;
/// Warps that a thread block may have, by the kernels' launch bounds.
const WARPS_MAX: usize = 8;
/// Tiles that a warp may have in shared memory: what the kernels can wait for.
const STAGES_MAX: usize = 8;
/// Shared memory that kernels declare themselves, and what the driver keeps for each block.
const RESERVED_BYTES: usize = 2048;

/// The oldest architecture that the kernels are for.
const CAPABILITY_MAJOR_MIN: usize = 8;

/// The device's part of a plan.
#[derive(Debug)]
pub struct DevicePlan {
    /// Thread blocks of a launch.
    pub blocks: u32,
    /// F32, two slots for each block.
    pub partials: Tensor,
    /// U32, one for each item; 0 between launches.
    pub arrivals: Tensor,
    /// Shared memory that a block may have, in bytes.
    shared_bytes_max: usize,
    /// The kernels that were used, which may have that much shared memory.
    functions: Mutex<Vec<(String, CudaFunction)>>,
}

/// How a kernel is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchShape {
    pub warps: usize,
    pub stages: usize,
    pub shared_bytes: usize,
}

/// Bytes of a partial result: `Partial` of the kernels.
const fn partial_bytes(value_dim: usize) -> usize {
    HEADS * (value_dim + 4 + 2) * size_of::<f32>()
}

impl DevicePlan {
    /// Returns `None` on a CPU device.
    pub fn new(device: &Device, batch_max: usize, query_heads: usize) -> Result<Option<Self>> {
        let Device::Cuda(cuda) = device else {
            return Ok(None);
        };
        let context = cuda.cuda_stream().context().clone();
        let attribute = |attribute| {
            let value = context.attribute(attribute).w()?;
            Ok::<_, candle_core::Error>(usize::try_from(value).unwrap_or_default())
        };
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        if major < CAPABILITY_MAJOR_MIN {
            return Err(VmmError::NoAttentionKernels);
        }
        let processors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared_bytes_max =
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let blocks = processors.clamp(1, BLOCKS_MAX);
        let slot = partial_bytes(256) / size_of::<f32>();
        let shape = Shape::from(2 * blocks * slot);
        // SAFETY: a kernel reads of it what it has written.
        let partials = unsafe { cuda.alloc_uninit(&shape, DType::F32)? };
        let partials = Storage::Cuda(partials);
        Ok(Some(Self {
            blocks: number(blocks)?,
            partials: Tensor::from_storage(partials, shape, BackpropOp::none(), false),
            arrivals: Tensor::zeros(batch_max * query_heads, DType::U32, device)?,
            shared_bytes_max,
            functions: Mutex::new(Vec::new()),
        }))
    }

    /// Returns a kernel, which may have all of the device's shared memory.
    pub fn function(
        &self,
        device: &candle_core::CudaDevice,
        image: &Image,
        name: &str,
    ) -> candle_core::Result<CudaFunction> {
        let mut functions = self
            .functions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some((_, function)) = functions.iter().find(|(known, _)| known == name) {
            return Ok(function.clone());
        }
        let function = image.function(device, name).w()?;
        let bytes = i32::try_from(self.shared_bytes_max - RESERVED_BYTES).unwrap_or(i32::MAX);
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(attribute, bytes).w()?;
        functions.push((name.to_owned(), function.clone()));
        Ok(function)
    }

    /// Chooses the warps of a thread block and the tiles that each has in shared memory, for heads
    /// of these padded sizes. As many warps as possible with two tiles each: one is computed while
    /// the other comes.
    pub fn shape(&self, dim: usize, value_dim: usize, element_bytes: usize) -> LaunchShape {
        shape_within(self.shared_bytes_max, dim, value_dim, element_bytes)
    }
}

fn shape_within(
    shared_bytes_max: usize,
    dim: usize,
    value_dim: usize,
    element_bytes: usize,
) -> LaunchShape {
    let row_bytes = |dim: usize| ((dim * element_bytes / UNIT_BYTES) | 1) * UNIT_BYTES;
    let stage_bytes = TILE * (row_bytes(dim) + row_bytes(value_dim));
    let weights_bytes = BLOCKS_MAX * HEADS * size_of::<f32>();
    let free_bytes = shared_bytes_max.saturating_sub(RESERVED_BYTES + weights_bytes);
    let stages = |warps: usize| {
        let own_bytes = (free_bytes / warps).saturating_sub(partial_bytes(value_dim));
        (own_bytes / stage_bytes).min(STAGES_MAX)
    };
    let has_two = |warps: &usize| stages(*warps) >= 2;
    // One warp with two tiles of the largest heads fits the smallest GPU.
    let warps = (1..=WARPS_MAX).rev().find(has_two).unwrap_or(1);
    let stages = stages(warps).max(1);
    LaunchShape {
        warps,
        stages,
        shared_bytes: weights_bytes + warps * (partial_bytes(value_dim) + stages * stage_bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_head_fits_the_smallest_and_the_largest_gpu() {
        // Compute capability 8.6 and 9.0.
        for shared_bytes_max in [99 << 10, 227 << 10] {
            for (dim, value_dim) in [(64, 64), (192, 128), (256, 256)] {
                for element_bytes in [1, 2, 4] {
                    let shape = shape_within(shared_bytes_max, dim, value_dim, element_bytes);
                    assert!(shape.stages >= 2, "{shape:?}");
                    assert!(shape.shared_bytes <= shared_bytes_max - RESERVED_BYTES);
                }
            }
        }
        let shape = shape_within(227 << 10, 128, 128, 2);
        assert_eq!((shape.warps, shape.stages), (8, 2));
    }
}
