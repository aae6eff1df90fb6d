//! The memory of blocks: ranges of addresses on a GPU, plain tensors on the CPU.
//!
//! # Safety
//! The caller of `reserved` promises to touch backed blocks only. This module ensures that the
//! addresses stay reserved while one of these tensors lives: dropping such a tensor asks the driver
//! to free its address.
#![allow(unsafe_code)]

use crate::device::core_device;
use crate::error::Result;
#[cfg(feature = "cuda")]
use crate::lease::Token;
#[cfg(feature = "cuda")]
use crate::tensor_pool::DeviceMemory;
use crate::tensor_pool::{self, TensorPoolInner};
use candle_core::{DType, Tensor};
#[cfg(feature = "cuda")]
use cuda_vmm::LeaseToken;
use cuda_vmm::pool::blocks::{BlockBacking, BlockId, LayerSpec, ReclaimPlan};
use cuda_vmm::{Engine, Stream};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The block tensors, and the record of which blocks are backed.
#[derive(Debug)]
pub(super) struct BlockMemory {
    backing: BlockBacking,
    storage: BlockStorage,
}

/// Where the block tensors are.
#[derive(Debug)]
enum BlockStorage {
    /// Candle tensors of all blocks. The backing's record is kept on a simulated device whose
    /// memory is not used, and `stream` is a stream of that device. The lock is held while blocks
    /// are backed or moved.
    Host {
        tensors: Mutex<Vec<Tensor>>,
        stream: Stream,
    },
    /// In the backing's addresses. Each token belongs to a tensor over all of them.
    #[cfg(feature = "cuda")]
    Device {
        memory: std::sync::Arc<DeviceMemory>,
        reserved: Mutex<Vec<Token>>,
    },
}

impl BlockMemory {
    pub(super) fn new(
        pool: &TensorPoolInner,
        spec: LayerSpec,
        blocks: usize,
        dtypes: &[DType],
    ) -> Result<Self> {
        match &pool.memory {
            tensor_pool::Memory::Host(budget) => {
                let core = core_device(&pool.device)?;
                let engine = Engine::new(&core, pool.options.engine)?;
                let page_bytes = pool.options.page_bytes.unwrap_or(core.granularity_bytes());
                let backing = BlockBacking::new(&engine, spec, blocks, page_bytes)?;
                let stream = Stream::new(&core)?;
                backing.use_stream(&stream)?;
                let tensors = backing.tensors().iter().zip(dtypes);
                let tensors = tensors.map(|(tensor, dtype)| {
                    let zeros = crate::zeros::zeros(&tensor.shape(), *dtype)?;
                    zeros.ok_or_else(|| budget.shortage(tensor.capacity_bytes(), 0))
                });
                let tensors = Mutex::new(tensors.collect::<Result<_>>()?);
                let storage = BlockStorage::Host { tensors, stream };
                Ok(Self { backing, storage })
            }
            #[cfg(feature = "cuda")]
            tensor_pool::Memory::Device(memory) => {
                let backing = BlockBacking::new(&memory.engine, spec, blocks, memory.page_bytes)?;
                backing.use_stream(&memory.stream)?;
                let (memory, reserved) = (memory.clone(), Mutex::default());
                let storage = BlockStorage::Device { memory, reserved };
                Ok(Self { backing, storage })
            }
        }
    }

    /// Locks a mutex. Fails in a forked process, where the lock may never be released.
    fn lock<'a, T>(&self, mutex: &'a Mutex<T>) -> Result<MutexGuard<'a, T>> {
        self.backing.engine().device().driver().check_process()?;
        Ok(mutex.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn backing(&self) -> &BlockBacking {
        &self.backing
    }

    pub(super) fn back(&self, blocks: impl IntoIterator<Item = BlockId>) -> Result<()> {
        let blocks: Vec<_> = blocks.into_iter().collect();
        // The record already shows moved blocks while `commit` still copies them.
        let _lock = match &self.storage {
            BlockStorage::Host { tensors, .. } => Some(self.lock(tensors)?),
            #[cfg(feature = "cuda")]
            BlockStorage::Device { .. } => None,
        };
        Ok(self.backing.back(blocks)?)
    }

    pub(super) fn commit(&self, plan: &ReclaimPlan) -> Result<()> {
        match &self.storage {
            BlockStorage::Host { tensors, stream } => {
                let tensors = self.lock(tensors)?;
                self.backing.commit(plan, stream)?;
                for tensor in tensors.iter() {
                    for (from, to) in plan.moves() {
                        // Candle copies no tensor into itself.
                        let block = tensor.narrow(0, *from, 1)?.force_contiguous()?;
                        tensor.slice_set(&block, 0, *to)?;
                    }
                }
                // Calls on the CPU are complete when they return.
                Ok(stream.synchronize()?)
            }
            #[cfg(feature = "cuda")]
            BlockStorage::Device { memory, .. } => Ok(self.backing.commit(plan, &memory.stream)?),
        }
    }

    /// Returns a view of the first blocks of a tensor, which must be backed.
    pub(super) fn prefix(&self, tensor: usize, blocks: usize, dtype: DType) -> Result<Tensor> {
        match &self.storage {
            BlockStorage::Host { tensors, .. } => {
                let tensors = self.lock(tensors)?;
                debug_assert_eq!(tensors[tensor].dtype(), dtype);
                Ok(tensors[tensor].narrow(0, 0, blocks)?)
            }
            #[cfg(feature = "cuda")]
            BlockStorage::Device { memory, .. } if blocks == 0 => {
                let mut shape = self.backing.tensors()[tensor].shape();
                shape[0] = 0;
                memory.leases.empty(&shape, dtype)
            }
            #[cfg(feature = "cuda")]
            BlockStorage::Device { memory, .. } => {
                let leases = &memory.leases;
                leases.first_blocks(&self.backing, tensor, blocks, dtype)
            }
        }
    }

    /// Returns all tensors, over all addresses.
    ///
    /// # Safety
    /// On a CUDA device only backed blocks are touched through them.
    pub(super) unsafe fn reserved(&self, dtypes: &[DType]) -> Result<Vec<Tensor>> {
        match &self.storage {
            BlockStorage::Host { tensors, .. } => {
                let tensors = self.lock(tensors)?;
                debug_assert_eq!(tensors.len(), dtypes.len());
                Ok(tensors.clone())
            }
            #[cfg(feature = "cuda")]
            BlockStorage::Device { memory, reserved } => {
                let mut reserved = self.lock(reserved)?;
                reserved.retain_mut(|token| !token.is_released());
                let mut all = Vec::new();
                for (tensor, dtype) in self.backing.tensors().iter().zip(dtypes) {
                    // SAFETY: the caller touches backed blocks only. The token keeps the addresses
                    // reserved, see `drop`.
                    let (tensor, token) = unsafe { memory.leases.reserved(tensor, *dtype) }?;
                    reserved.push(token);
                    all.push(tensor);
                }
                Ok(all)
            }
        }
    }
}

#[cfg(feature = "cuda")]
impl Drop for BlockMemory {
    fn drop(&mut self) {
        let BlockStorage::Device { reserved, .. } = &mut self.storage else {
            return;
        };
        let reserved = reserved.get_mut().unwrap_or_else(PoisonError::into_inner);
        if reserved.iter_mut().any(|token| !token.is_released()) {
            tracing::warn!(
                "reserved tensors outlive their blocks; the blocks' addresses are never freed"
            );
            std::mem::forget(self.backing.clone());
        }
    }
}
