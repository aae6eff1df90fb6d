//! What decode kernels need beside their inputs: how many thread blocks, and memory for what they
//! have of an item until it is joined.
//!
//! # Safety
//! The partial results have two slots for each thread block, and there is an arrival count for each
//! item. Kernels of one stream use them one after the other, and each leaves the counts at 0.
#![allow(unsafe_code)]

use super::cuda_addresses::wrap;
use super::kv_batch::KvBatch;
use super::kv_memory::KvMemory;
use crate::error::{Result, VmmError};
use crate::kernels::{Image, Kernel};
use candle_core::backend::BackendDevice;
use candle_core::cuda::WrapErr;
use candle_core::cuda::cudarc::driver::sys::{
    CUdevice_attribute as Attribute, CUfunction_attribute,
};
use candle_core::{DType, Device, Shape, Tensor};
use std::sync::{Mutex, PoisonError};

/// Query heads of an item: `HEADS` of the kernels.
const HEADS: usize = 8;
/// Keys of a tile: `TILE` of the kernels.
const TILE: usize = 16;
/// Threads of a warp.
const LANES: usize = 32;
/// Warps that a thread block may have: `WARPS_MAX` of the kernels.
const WARPS_MAX: usize = 16;
/// Warps that are fastest if each has few tiles.
const WARPS_OF_FEW: usize = 8;
/// Tiles of a thread block that are few.
const FEW_TILES: usize = 16;
/// Shared memory that kernels declare themselves, and what the driver keeps for each block.
const RESERVED_BYTES: usize = 2048;

/// The oldest architecture that the kernels are for.
const CAPABILITY_MAJOR_MIN: usize = 8;

/// The device's part of a plan.
#[derive(Debug)]
pub struct DevicePlan {
    processors: usize,
    /// F32, two slots for each block of a launch.
    pub partials: Tensor,
    /// U32, one for each item; 0 between launches.
    pub arrivals: Tensor,
    /// Shared memory that a block may have, in bytes.
    shared_bytes_max: usize,
    /// The kernels that were used, which may have that much shared memory.
    functions: Mutex<Vec<(String, Kernel)>>,
}

/// What a launch is to do.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    pub items: usize,
    /// The most of an item.
    pub tiles: usize,
    pub is_paged: bool,
}

impl Work {
    pub fn new(kv: &KvBatch, group: usize) -> Self {
        Self {
            items: kv.batch() * kv.kv_heads() * group.div_ceil(HEADS),
            tiles: kv.capacity().div_ceil(TILE),
            is_paged: matches!(kv.memory, KvMemory::Blocks { .. }),
        }
    }
}

/// How a kernel is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchShape {
    pub blocks: usize,
    pub warps: usize,
}

impl LaunchShape {
    /// Chooses a shape for a launch on a GPU with this many multiprocessors.
    ///
    /// Items that are as many as the multiprocessors get two blocks on each, so that one reads
    /// while the other joins results. Fewer get one, so that fewer results are to be joined, and so
    /// do paged caches, which were faster by it.
    pub fn new(processors: usize, work: &Work, warps_max: usize) -> Self {
        if work.items >= processors && !work.is_paged {
            return Self {
                blocks: 2 * processors,
                warps: (warps_max / 2).max(1),
            };
        }
        let is_few = work.items * work.tiles <= FEW_TILES * processors;
        Self {
            blocks: processors,
            warps: warps_max.min(if is_few { WARPS_OF_FEW } else { WARPS_MAX }),
        }
    }

    /// Returns the shared memory of a block, in bytes: `Shared` of the kernels.
    pub fn shared_bytes(&self, dim: usize, value_dim: usize) -> usize {
        // A fragment of queries for each 16 dims; a column for each thread; a maximum for each warp
        // and head.
        let queries = dim / 16 * LANES * 16;
        let columns = WARPS_MAX * LANES * 32;
        let max = WARPS_MAX * HEADS * size_of::<f32>();
        queries + columns + max + self.warps * partial_bytes(value_dim)
    }
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
        let slot = partial_bytes(256) / size_of::<f32>();
        let shape = Shape::from(2 * 2 * processors * slot);
        // SAFETY: a kernel reads of it what it has written.
        let partials = unsafe { cuda.alloc_uninit(&shape, DType::F32)? };
        Ok(Some(Self {
            processors,
            partials: wrap(partials, shape),
            arrivals: Tensor::zeros(batch_max * query_heads, DType::U32, device)?,
            shared_bytes_max,
            functions: Mutex::new(Vec::new()),
        }))
    }

    /// Returns a kernel, which may have all of the device's shared memory.
    pub fn kernel(
        &self,
        device: &candle_core::CudaDevice,
        image: &Image,
        name: &str,
    ) -> candle_core::Result<Kernel> {
        let mut functions = self
            .functions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some((_, kernel)) = functions.iter().find(|(known, _)| known == name) {
            return Ok(kernel.clone());
        }
        let kernel = image.kernel(device, name).w()?;
        let bytes = i32::try_from(self.shared_bytes_max - RESERVED_BYTES).unwrap_or(i32::MAX);
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        kernel.function.set_attribute(attribute, bytes).w()?;
        functions.push((name.to_owned(), kernel.clone()));
        Ok(kernel)
    }

    /// Chooses how a kernel is launched.
    pub fn shape(&self, kernel: &Kernel, work: &Work) -> LaunchShape {
        let warps_max = (kernel.threads_max / LANES).clamp(1, WARPS_MAX);
        LaunchShape::new(self.processors, work, warps_max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_head_fits_the_smallest_and_the_largest_gpu() {
        // Compute capability 8.6 and 9.0. The kernels' launch bounds allow these warps.
        for shared_bytes_max in [99 << 10, 227 << 10] {
            for (dim, value_dim, warps) in [(64, 64, 16), (192, 128, 8), (256, 256, 8)] {
                let shape = LaunchShape { blocks: 1, warps };
                assert!(shape.shared_bytes(dim, value_dim) <= shared_bytes_max - RESERVED_BYTES);
            }
        }
    }

    #[test]
    fn many_items_get_two_blocks_on_each_multiprocessor() {
        let shape = |items, keys: usize, is_paged| {
            let work = Work {
                items,
                tiles: keys / TILE,
                is_paged,
            };
            let shape = LaunchShape::new(132, &work, 12);
            (shape.blocks, shape.warps)
        };
        assert_eq!(shape(8, 1 << 10, false), (132, 8));
        assert_eq!(shape(8, 8 << 10, false), (132, 12));
        assert_eq!(shape(32 * 8, 1 << 10, false), (264, 6));
        assert_eq!(shape(32 * 8, 1 << 10, true), (132, 12));
    }
}
