//! Where blocks are: in ranges of addresses on a GPU, in plain tensors on the CPU.
//!
//! # Safety
//! Tensors over all addresses are made for a caller who promises to touch backed blocks only. That the addresses are not
//! somebody else's while one of them lives is kept here: dropping such a tensor asks the driver to free its address.
#![allow(unsafe_code)]

use crate::device::core_device;
use crate::error::Result;
#[cfg(feature = "cuda")]
use crate::lease::Token;
#[cfg(feature = "cuda")]
use crate::tensor_pool::DeviceMemory;
use crate::tensor_pool::{self, Inner};
use candle_core::{DType, Tensor};
#[cfg(feature = "cuda")]
use cuda_vmm::LeaseToken;
use cuda_vmm::pool::blocks::{BlockBacking, BlockId, LayerSpec, ReclaimPlan};
use cuda_vmm::{Engine, Stream};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Which blocks are backed, and the tensors.
#[derive(Debug)]
pub(super) struct Memory {
    backing: BlockBacking,
    place: Place,
}

#[derive(Debug)]
enum Place {
    /// All blocks of each tensor. The books, with memory that nobody reads, are on a simulated device, and this is a stream
    /// of it. The lock is held where blocks come, or are moved.
    Host {
        tensors: Mutex<Vec<Tensor>>,
        stream: Stream,
    },
    /// In the backing's addresses. The tokens are of tensors over all of them.
    #[cfg(feature = "cuda")]
    Device {
        memory: std::sync::Arc<DeviceMemory>,
        reserved: Mutex<Vec<Token>>,
    },
}

impl Memory {
    pub(super) fn new(
        pool: &Inner,
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
                let place = Place::Host { tensors, stream };
                Ok(Self { backing, place })
            }
            #[cfg(feature = "cuda")]
            tensor_pool::Memory::Device(memory) => {
                let backing = BlockBacking::new(&memory.engine, spec, blocks, memory.page_bytes)?;
                backing.use_stream(&memory.stream)?;
                let (memory, reserved) = (memory.clone(), Mutex::default());
                let place = Place::Device { memory, reserved };
                Ok(Self { backing, place })
            }
        }
    }

    /// Locks one of its own. Fails in a forked process, where the lock may be held for good.
    fn lock<'a, T>(&self, mutex: &'a Mutex<T>) -> Result<MutexGuard<'a, T>> {
        self.backing.engine().device().driver().check_process()?;
        Ok(mutex.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn backing(&self) -> &BlockBacking {
        &self.backing
    }

    pub(super) fn back(&self, blocks: impl IntoIterator<Item = BlockId>) -> Result<()> {
        let blocks: Vec<_> = blocks.into_iter().collect();
        // Not while blocks are copied of which the books know already that they have moved.
        let _held = match &self.place {
            Place::Host { tensors, .. } => Some(self.lock(tensors)?),
            #[cfg(feature = "cuda")]
            Place::Device { .. } => None,
        };
        Ok(self.backing.back(blocks)?)
    }

    pub(super) fn commit(&self, plan: &ReclaimPlan) -> Result<()> {
        match &self.place {
            Place::Host { tensors, stream } => {
                let tensors = self.lock(tensors)?;
                self.backing.commit(plan, stream)?;
                for tensor in tensors.iter() {
                    for (from, to) in plan.moves() {
                        // Candle copies no tensor into itself.
                        let block = tensor.narrow(0, *from, 1)?.force_contiguous()?;
                        tensor.slice_set(&block, 0, *to)?;
                    }
                }
                // As everything on the CPU, it has been done when the call returns.
                Ok(stream.synchronize()?)
            }
            #[cfg(feature = "cuda")]
            Place::Device { memory, .. } => Ok(self.backing.commit(plan, &memory.stream)?),
        }
    }

    /// The first blocks of a tensor; they are backed.
    pub(super) fn prefix(&self, tensor: usize, blocks: usize, dtype: DType) -> Result<Tensor> {
        match &self.place {
            Place::Host { tensors, .. } => {
                let tensors = self.lock(tensors)?;
                debug_assert_eq!(tensors[tensor].dtype(), dtype);
                Ok(tensors[tensor].narrow(0, 0, blocks)?)
            }
            #[cfg(feature = "cuda")]
            Place::Device { memory, .. } if blocks == 0 => {
                let mut shape = self.backing.tensors()[tensor].shape();
                shape[0] = 0;
                memory.leases.empty(&shape, dtype)
            }
            #[cfg(feature = "cuda")]
            Place::Device { memory, .. } => {
                let leases = &memory.leases;
                leases.first_blocks(&self.backing, tensor, blocks, dtype)
            }
        }
    }

    /// All tensors, over all addresses.
    ///
    /// # Safety
    /// On a CUDA device only backed blocks are touched through them.
    pub(super) unsafe fn reserved(&self, dtypes: &[DType]) -> Result<Vec<Tensor>> {
        match &self.place {
            Place::Host { tensors, .. } => {
                let tensors = self.lock(tensors)?;
                debug_assert_eq!(tensors.len(), dtypes.len());
                Ok(tensors.clone())
            }
            #[cfg(feature = "cuda")]
            Place::Device { memory, reserved } => {
                let mut reserved = self.lock(reserved)?;
                reserved.retain_mut(|token| !token.is_released());
                let mut all = Vec::new();
                for (tensor, dtype) in self.backing.tensors().iter().zip(dtypes) {
                    // SAFETY: the caller's promise; and the token keeps the addresses, see `drop`.
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
impl Drop for Memory {
    fn drop(&mut self) {
        let Place::Device { reserved, .. } = &mut self.place else {
            return;
        };
        let reserved = reserved.get_mut().unwrap_or_else(PoisonError::into_inner);
        if reserved.iter_mut().any(|token| !token.is_released()) {
            tracing::warn!(
                "reserved tensors outlive their blocks, whose addresses are never given back"
            );
            std::mem::forget(self.backing.clone());
        }
    }
}
