//! Many models under one limit of physical memory.

use crate::device::core_device;
use crate::error::{Result, VmmError};
use crate::virtual_memory::{GlobalMemoryStats, MemoryStats, whole_pages};
use candle_core::Device;
use cuda_vmm::{ModelOptions, ModelQuota};
use std::task::Waker;
use std::time::Duration;

/// Models that share one limit of physical memory on one device, each in a range of addresses of its own.
///
/// ```
/// # #[cfg(feature = "simulator")] {
/// use candle_cuda_vmm::SharedMemoryPool;
///
/// let mut pool = SharedMemoryPool::new(32 << 30, candle_core::Device::Cpu)?;
/// pool.register_model("llama-7b", 64 << 30)?;
/// pool.register_model("gpt2", 32 << 30)?;
///
/// let first = pool.allocate_for_model("llama-7b", 1 << 30)?;
/// let second = pool.allocate_for_model("llama-7b", 1 << 30)?;
/// assert_ne!(first, second);
/// pool.deallocate_for_model_address("llama-7b", first, 1 << 30)?;
/// # }
/// # Ok::<(), candle_cuda_vmm::VmmError>(())
/// ```
pub struct SharedMemoryPool {
    pool: cuda_vmm::SharedMemoryPool,
}

impl SharedMemoryPool {
    /// A pool without models, whose models together may hold `physical_limit` bytes. Pages are of the
    /// device's granularity.
    ///
    /// The limit may exceed the device's memory: then the device's memory is what runs out.
    ///
    /// # Errors
    /// - [`Vmm`](VmmError::Vmm) with `ZeroSize` if `physical_limit` is 0.
    /// - What [`core_device`] returns for the device.
    pub fn new(physical_limit: usize, device: Device) -> Result<Self> {
        let device = core_device(&device)?;
        let pool = cuda_vmm::SharedMemoryPool::new(&device, physical_limit)?;
        Ok(Self { pool })
    }

    /// Registers a model, and reserves addresses for `virtual_capacity` bytes (rounded up to whole
    /// pages) for it.
    ///
    /// # Errors
    /// A model that could not be registered is not registered in part.
    /// - [`ModelAlreadyExists`](VmmError::ModelAlreadyExists) if there is one of this name.
    /// - [`Vmm`](VmmError::Vmm) with `ZeroSize` if `virtual_capacity` is 0, or with the driver's answer if
    ///   it has no room for so many addresses; [`InvalidOffset`](VmmError::InvalidOffset) if the capacity
    ///   cannot be rounded up.
    pub fn register_model(&mut self, model_id: &str, virtual_capacity: usize) -> Result<()> {
        let capacity = whole_pages(virtual_capacity, self.pool.page_bytes());
        Ok(self.pool.register_model(model_id, capacity)?)
    }

    /// As [`register_model`](Self::register_model), with a guarantee, a ceiling and a priority. New in 0.2.0.
    ///
    /// # Errors
    /// As there; [`Vmm`](VmmError::Vmm) with `QuotaUnsatisfiable` if the guarantee is above the ceiling or cannot hold beside
    /// what others hold and are guaranteed.
    pub fn register_model_with(&mut self, model_id: &str, options: ModelOptions) -> Result<()> {
        let options = ModelOptions {
            capacity_bytes: whole_pages(options.capacity_bytes, self.pool.page_bytes()),
            ..options
        };
        Ok(self.pool.register_model_with(model_id, options)?)
    }

    /// Changes a model's guarantee, ceiling and priority while it runs; see [`cuda_vmm::SharedMemoryPool::set_quota`]. New in
    /// 0.2.0.
    ///
    /// # Errors
    /// [`ModelNotFound`](VmmError::ModelNotFound); [`Vmm`](VmmError::Vmm) with `QuotaUnsatisfiable` for what cannot hold, and
    /// then nothing has changed.
    pub fn set_quota(&self, model_id: &str, quota: ModelQuota) -> Result<()> {
        Ok(self.pool.set_quota(model_id, quota)?)
    }

    /// A model's guarantee, ceiling and priority; `None` if there is no such model. New in 0.2.0.
    pub fn quota(&self, model_id: &str) -> Option<ModelQuota> {
        self.pool.quota(model_id)
    }

    /// Allocates `size` bytes for a model and returns their address, a multiple of 256. A model may
    /// allocate as often as it likes; what it has stays where it is.
    ///
    /// # Errors
    /// A failed allocation changes nothing.
    /// - [`ModelNotFound`](VmmError::ModelNotFound).
    /// - [`Vmm`](VmmError::Vmm) with `ZeroSize` if `size` is 0.
    /// - [`OutOfVirtualMemory`](VmmError::OutOfVirtualMemory) if the model's range has no unused run of
    ///   that length.
    /// - [`OutOfPhysicalMemory`](VmmError::OutOfPhysicalMemory) if the limit, or the device's memory, does
    ///   not suffice.
    /// - [`Vmm`](VmmError::Vmm) if a driver call fails.
    pub fn allocate_for_model(&mut self, model_id: &str, size: usize) -> Result<usize> {
        let address = self.pool.allocate_for_model(model_id, size);
        Ok(address.map_err(VmmError::as_in_0_1_1)? as usize)
    }

    /// As [`allocate_for_model`](Self::allocate_for_model), but waits up to `timeout` for memory, also for what other models are
    /// asked to give back; served by priority, then in the order in which they came. New in 0.2.0.
    ///
    /// It takes `&self`, so that others can use the pool meanwhile; they free what is theirs through [`core`](Self::core).
    ///
    /// # Errors
    /// As there, [`OutOfPhysicalMemory`](VmmError::OutOfPhysicalMemory) when the time is over; at once for what can never be
    /// had, and where the device has no memory although the limit has room.
    pub fn allocate_for_model_timeout(
        &self,
        model_id: &str,
        size: usize,
        timeout: Duration,
    ) -> Result<usize> {
        let pool = &self.pool;
        let address = pool.allocate_for_model_timeout(model_id, size, timeout);
        Ok(address.map_err(VmmError::as_in_0_1_1)? as usize)
    }

    /// How many bytes a model is asked to give back, to others that want memory or because its ceiling was lowered; `None`
    /// if there is no such model. See [`cuda_vmm::VirtualMemoryPool::owed_bytes`], which takes no lock. New in 0.2.0.
    pub fn owed_bytes(&self, model_id: &str) -> Option<usize> {
        self.pool.model_owed_bytes(model_id)
    }

    /// Has `waker` woken each time a model has come to owe more; `None` for nobody. See
    /// [`cuda_vmm::VirtualMemoryPool::set_owed_waker`]. New in 0.2.0.
    ///
    /// # Errors
    /// [`ModelNotFound`](VmmError::ModelNotFound).
    pub fn set_owed_waker(&self, model_id: &str, waker: Option<Waker>) -> Result<()> {
        self.pool.model(model_id)?.set_owed_waker(waker);
        Ok(())
    }

    /// Gives back to the driver what a model holds and does not use; returns the bytes. See
    /// [`cuda_vmm::VirtualMemoryPool::give_back`]. New in 0.2.0.
    ///
    /// # Errors
    /// [`ModelNotFound`](VmmError::ModelNotFound); [`Vmm`](VmmError::Vmm) if a driver call fails.
    pub fn give_back(&self, model_id: &str) -> Result<usize> {
        Ok(self.pool.model(model_id)?.give_back()?)
    }

    /// Gives at least `bytes` bytes back to the driver, if so much can be spared, for when Candle has run out of memory beside
    /// the pool; returns the bytes that went. See [`relief`](crate::relief). New in 0.2.0.
    pub fn relieve(&self, bytes: usize) -> usize {
        self.pool.relieve(bytes)
    }

    /// Frees `size` live bytes at `offset` from the model's base address: all of an allocation, part of
    /// one, or several that adjoin. Returns at once.
    ///
    /// # Errors
    /// A failed call frees nothing.
    /// - [`ModelNotFound`](VmmError::ModelNotFound).
    /// - [`Vmm`](VmmError::Vmm) with `ZeroSize` if `size` is 0.
    /// - [`InvalidOffset`](VmmError::InvalidOffset) if the bytes do not lie within the model's capacity,
    ///   or `offset + size` overflows.
    /// - [`NotMapped`](VmmError::NotMapped) if any of the bytes is not live.
    pub fn deallocate_for_model(
        &mut self,
        model_id: &str,
        offset: usize,
        size: usize,
    ) -> Result<()> {
        self.pool
            .deallocate_for_model(model_id, offset, size)
            .map_err(|error| self.convert(model_id, error))
    }

    /// Frees `size` live bytes at an address that [`allocate_for_model`](Self::allocate_for_model)
    /// returned, or at one within such an allocation.
    ///
    /// # Errors
    /// As [`deallocate_for_model`](Self::deallocate_for_model), with the offset from the model's base
    /// address; [`NotMapped`](VmmError::NotMapped) at offset 0 for an address below that.
    pub fn deallocate_for_model_address(
        &mut self,
        model_id: &str,
        address: usize,
        size: usize,
    ) -> Result<()> {
        self.pool
            .deallocate_for_model_address(model_id, address as u64, size)
            .map_err(|error| self.convert(model_id, error))
    }

    /// Address of the first byte of a model's range, `None` if there is no such model. An address that
    /// [`allocate_for_model`](Self::allocate_for_model) returned, less this one, is the offset that
    /// [`deallocate_for_model`](Self::deallocate_for_model) takes.
    pub fn model_base_address(&self, model_id: &str) -> Option<usize> {
        let address = self.pool.model_base_address(model_id)?;
        Some(address as usize)
    }

    /// A model's statistics, as 0.1.1 had them; `None` if there is no such model.
    pub fn get_model_stats(&self, model_id: &str) -> Option<MemoryStats> {
        self.pool.model_stats(model_id).map(MemoryStats::from)
    }

    /// Statistics of all models together, as 0.1.1 had them.
    pub fn global_stats(&self) -> GlobalMemoryStats {
        let models = self.pool.models().len();
        GlobalMemoryStats::new(self.pool.limit_bytes(), models, &self.pool.stats())
    }

    /// Unregisters a model, and frees everything it has.
    ///
    /// # Errors
    /// [`ModelNotFound`](VmmError::ModelNotFound).
    pub fn unregister_model(&mut self, model_id: &str) -> Result<()> {
        Ok(self.pool.unregister_model(model_id)?)
    }

    /// Where every byte that the device holds for this pool is; prints well.
    pub fn detailed_stats(&self) -> cuda_vmm::EngineStats {
        self.pool.stats()
    }

    /// The pool of [`cuda_vmm`] inside, which has more: placement by offset, the streams that use a
    /// range. What it allocates and frees is this pool's.
    pub fn core(&self) -> &cuda_vmm::SharedMemoryPool {
        &self.pool
    }

    /// The error of this crate, with the model's capacity where the core's does not have it.
    fn convert(&self, model_id: &str, error: cuda_vmm::VmmError) -> VmmError {
        let capacity = |unknown| match self.pool.model_stats(model_id) {
            Some(stats) => stats.capacity_bytes,
            None => unknown,
        };
        match VmmError::from(error) {
            VmmError::InvalidOffset {
                offset,
                size,
                capacity: unknown,
            } => VmmError::InvalidOffset {
                offset,
                size,
                capacity: capacity(unknown),
            },
            error => error,
        }
    }
}
