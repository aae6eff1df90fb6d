//! The account behind a pool, and what tensors and blocks take from it.

use super::options::TensorPoolOptions;
use crate::error::Result;
use cuda_vmm::pool::blocks::{BlockBacking, BlockOptions, LayerSpec};
use cuda_vmm::{Account, Device, Engine, PoolOptions, Stream, VirtualMemoryPool};
use std::sync::Arc;

/// The memory behind a pool.
#[derive(Debug)]
pub(crate) enum Memory {
    /// Candle's own tensors on the CPU, with the memory that a GPU would need for them on the
    /// simulated device.
    Host(Arc<PoolMemory>),
    /// Tensors in the addresses of ranges.
    #[cfg(feature = "cuda")]
    Device(Arc<DeviceMemory>),
}

impl Memory {
    pub(crate) fn common(&self) -> &PoolMemory {
        match self {
            Self::Host(memory) => memory,
            #[cfg(feature = "cuda")]
            Self::Device(memory) => &memory.common,
        }
    }
}

/// What a pool has on each kind of device: an account, and how ranges on it are made.
#[derive(Debug)]
pub(crate) struct PoolMemory {
    account: Account,
    stream: Stream,
    page_bytes: usize,
    ahead_bytes_max: usize,
}

impl PoolMemory {
    /// Charges an account, or else one of its own on a new engine. All work on its memory is queued
    /// on `stream`.
    pub(super) fn new(
        device: &Device,
        account: Option<&Account>,
        stream: Stream,
        options: &TensorPoolOptions,
    ) -> Result<Self> {
        let granularity_bytes = device.granularity_bytes();
        let page_bytes = options.page_bytes.unwrap_or(granularity_bytes);
        cuda_vmm::pool::check_page_bytes(page_bytes, granularity_bytes)?;
        let account = match account {
            Some(account) => account.clone(),
            None => Engine::new(device, options.engine)?.own_account()?,
        };
        Ok(Self {
            account,
            stream,
            page_bytes,
            ahead_bytes_max: options.ahead_bytes_max,
        })
    }

    pub(crate) fn account(&self) -> &Account {
        &self.account
    }

    /// The stream on which work on the memory is queued: Candle's. On a CPU device it is a stream
    /// of the simulated device, on which only [`BlockBacking::commit`] queues anything.
    pub(crate) fn stream(&self) -> &Stream {
        &self.stream
    }

    pub(crate) fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// Reserves this many bytes of addresses. Allocates no memory.
    pub(crate) fn range(&self, bytes: usize) -> Result<VirtualMemoryPool> {
        self.range_with(
            bytes,
            PoolOptions::new().ahead_bytes_max(self.ahead_bytes_max),
        )
    }

    /// As [`range`](Self::range), for memory that comes and goes as a whole.
    pub(crate) fn range_of_whole(&self, bytes: usize) -> Result<VirtualMemoryPool> {
        self.range_with(bytes, PoolOptions::new().chunk_bytes_max(1 << 30))
    }

    fn range_with(&self, bytes: usize, options: PoolOptions) -> Result<VirtualMemoryPool> {
        let (account, page_bytes) = (&self.account, self.page_bytes);
        let range = VirtualMemoryPool::on_account(account, bytes, page_bytes, options)?;
        range.use_stream(&self.stream)?;
        Ok(range)
    }

    /// Reserves the addresses of a paged cache. Allocates no memory.
    pub(crate) fn backing(
        &self,
        spec: LayerSpec,
        blocks: usize,
        options: BlockOptions,
    ) -> Result<BlockBacking> {
        let (account, page_bytes) = (&self.account, self.page_bytes);
        let backing = BlockBacking::with_options(account, spec, blocks, page_bytes, options)?;
        backing.use_stream(&self.stream)?;
        Ok(backing)
    }
}

/// What a pool has on a CUDA device.
#[cfg(feature = "cuda")]
#[derive(Debug)]
pub(crate) struct DeviceMemory {
    pub(crate) common: PoolMemory,
    pub(crate) leases: Arc<crate::lease::Leases>,
    pub(crate) append: crate::append::Append,
}
