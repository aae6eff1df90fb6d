//! The memory of blocks: ranges of addresses on a GPU, plain tensors on the CPU.
//!
//! # Safety
//! The caller of `reserved` promises to touch backed blocks only. This module ensures that the
//! addresses stay reserved while one of these tensors lives: dropping such a tensor asks the driver
//! to free its address.
#![allow(unsafe_code)]

use super::ElasticBlocksOptions;
use crate::error::Result;
#[cfg(feature = "cuda")]
use crate::lease::Token;
#[cfg(feature = "cuda")]
use crate::tensor_pool::DeviceMemory;
use crate::tensor_pool::{Memory, PoolMemory, TensorPoolInner};
use crate::zeros::zeros;
use candle_core::{DType, Tensor};
#[cfg(feature = "cuda")]
use cuda_vmm::LeaseToken;
use cuda_vmm::Stream;
use cuda_vmm::pool::blocks::{BlockBacking, BlockId, LayerSpec, ReclaimPlan};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The block tensors, and the record of which blocks are backed.
#[derive(Debug)]
pub(super) struct BlockMemory {
    backing: BlockBacking,
    storage: BlockStorage,
}

/// Where the block tensors are.
#[derive(Debug)]
enum BlockStorage {
    /// Candle tensors of all blocks. The backing's memory is the simulated device's, and is not
    /// used. The lock is held while blocks are moved or zeroed.
    Host {
        memory: Arc<PoolMemory>,
        tensors: Mutex<Vec<Tensor>>,
        zeroes: bool,
    },
    /// In the backing's addresses. Each token belongs to a tensor over all of them.
    #[cfg(feature = "cuda")]
    Device {
        memory: Arc<DeviceMemory>,
        reserved: Mutex<Vec<Token>>,
    },
}

impl BlockMemory {
    pub(super) fn new(
        pool: &TensorPoolInner,
        (spec, blocks): (LayerSpec, usize),
        dtypes: &[DType],
        options: ElasticBlocksOptions,
    ) -> Result<Self> {
        match &pool.memory {
            Memory::Host(memory) => {
                let backing = memory.backing(spec, blocks, options.on_stream(memory.stream()))?;
                let tensors = backing.tensors().iter().zip(dtypes);
                let tensors = tensors.map(|(tensor, dtype)| zeros(&tensor.shape(), *dtype));
                let tensors = Mutex::new(tensors.collect::<Result<_>>()?);
                let memory = memory.clone();
                let zeroes = options.zero_on_back;
                let storage = BlockStorage::Host {
                    memory,
                    tensors,
                    zeroes,
                };
                Ok(Self { backing, storage })
            }
            #[cfg(feature = "cuda")]
            Memory::Device(memory) => {
                let options = options.on_stream(memory.common.stream());
                let backing = memory.common.backing(spec, blocks, options)?;
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

    /// Zeroes those of the blocks on the CPU that are not backed, if blocks are to be zero when
    /// they are backed. Another thread that backs one of them uses it only after `await_copies`.
    pub(super) fn before_back(&self, blocks: &[BlockId]) -> Result<()> {
        let BlockStorage::Host {
            tensors,
            zeroes: true,
            ..
        } = &self.storage
        else {
            return Ok(());
        };
        let tensors = self.lock(tensors)?;
        let bare =
            |block: &&BlockId| **block < self.backing.blocks() && !self.backing.is_backed(**block);
        let zeros: Vec<_> = tensors.iter().map(zero_block).collect::<Result<_>>()?;
        zero(&tensors, &zeros, blocks.iter().filter(bare))
    }

    /// Returns when the copies of a commit that has freed blocks are done. Called after blocks were
    /// backed, before they are written: on the CPU a commit copies after it has changed the record.
    pub(super) fn await_copies(&self) -> Result<()> {
        match &self.storage {
            BlockStorage::Host { tensors, .. } => self.lock(tensors).map(drop),
            #[cfg(feature = "cuda")]
            BlockStorage::Device { .. } => Ok(()),
        }
    }

    /// Carries out a plan by `commit`, and copies the contents of the blocks that move.
    pub(super) fn commit(
        &self,
        plan: &ReclaimPlan,
        commit: impl FnOnce(&Stream) -> cuda_vmm::Result<()>,
    ) -> Result<()> {
        match &self.storage {
            BlockStorage::Host {
                memory,
                tensors,
                zeroes,
            } => {
                let (tensors, stream) = (self.lock(tensors)?, memory.stream());
                // Candle copies no tensor into itself. What can fail comes before the commit.
                let copies = tensors.iter().map(|tensor| {
                    let moves = plan.moves().iter();
                    let copy = |(from, _): &(BlockId, BlockId)| {
                        tensor.narrow(0, *from, 1)?.force_contiguous()
                    };
                    moves.map(copy).collect::<candle_core::Result<Vec<_>>>()
                });
                let copies: Vec<_> = copies.collect::<candle_core::Result<_>>()?;
                let zeros = match zeroes {
                    true => tensors.iter().map(zero_block).collect::<Result<_>>()?,
                    false => Vec::new(),
                };
                commit(stream)?;
                for (tensor, copies) in tensors.iter().zip(&copies) {
                    for (copy, (_, to)) in copies.iter().zip(plan.moves()) {
                        tensor.slice_set(copy, 0, *to)?;
                    }
                }
                // An allocator does not say which blocks it backs next.
                let sources = plan.moves().iter().map(|(from, _)| from);
                zero(&tensors, &zeros, plan.evicted().iter().chain(sources))?;
                // Calls on the CPU are complete when they return. The plan is carried out: if the
                // simulated stream fails, its memory retires a little later.
                let _ = stream.synchronize();
                Ok(())
            }
            #[cfg(feature = "cuda")]
            BlockStorage::Device { memory, .. } => Ok(commit(memory.common.stream())?),
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

/// One block of a tensor on the CPU, of zeros.
fn zero_block(tensor: &Tensor) -> Result<Tensor> {
    let mut shape = tensor.dims().to_vec();
    shape[0] = 1;
    zeros(&shape, tensor.dtype())
}

/// Zeroes blocks on the CPU, with a block of zeros for each tensor.
fn zero<'a>(
    tensors: &[Tensor],
    zeros: &[Tensor],
    blocks: impl Iterator<Item = &'a BlockId> + Clone,
) -> Result<()> {
    for (tensor, zeros) in tensors.iter().zip(zeros) {
        blocks
            .clone()
            .try_for_each(|block| tensor.slice_set(zeros, 0, *block))?;
    }
    Ok(())
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
