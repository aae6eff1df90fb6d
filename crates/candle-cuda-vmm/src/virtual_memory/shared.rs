//! Many models under one limit of physical memory.

use super::pages::whole_pages;
use super::stats::{GlobalMemoryStats, MemoryStats};
use crate::device::core_device;
use crate::error::{Result, VmmError};
use candle_core::Device;
use cuda_vmm::{EngineStats, ModelOptions, ModelQuota};
use std::task::Waker;
use std::time::Duration;

/// Models that share one limit of physical memory on one device, each with its own range of
/// addresses.
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
    /// Makes a pool without models. All models together may hold `physical_limit` bytes. Pages have
    /// the device's granularity.
    ///
    /// The limit may exceed the device's memory. Then the device runs out of memory first.
    ///
    /// # Errors
    /// - [`Vmm`](VmmError::Vmm) with `ZeroSize` if `physical_limit` is 0.
    /// - Any error of [`core_device`].
    pub fn new(physical_limit: usize, device: Device) -> Result<Self> {
        let device = core_device(&device)?;
        let pool = cuda_vmm::SharedMemoryPool::new(&device, physical_limit)?;
        Ok(Self { pool })
    }

    /// Registers a model, and reserves addresses for `virtual_capacity` bytes, rounded up to whole
    /// pages.
    ///
    /// # Errors
    /// After an error the model is not registered.
    /// - [`ModelAlreadyExists`](VmmError::ModelAlreadyExists) if a model of this name is
    ///   registered.
    /// - [`Vmm`](VmmError::Vmm) with `ZeroSize` if `virtual_capacity` is 0.
    /// - [`InvalidOffset`](VmmError::InvalidOffset) if the capacity cannot be rounded up.
    /// - [`Vmm`](VmmError::Vmm) with the driver's error if it cannot reserve that many addresses.
    pub fn register_model(&mut self, model_id: &str, virtual_capacity: usize) -> Result<()> {
        let capacity = whole_pages(virtual_capacity, self.pool.page_bytes());
        Ok(self.pool.register_model(model_id, capacity)?)
    }

    /// As [`register_model`](Self::register_model), with a guarantee, a ceiling and a priority. New
    /// in 0.2.0.
    ///
    /// # Errors
    /// As [`register_model`](Self::register_model), and [`Vmm`](VmmError::Vmm) with
    /// `QuotaUnsatisfiable` if the guarantee is above the ceiling, or cannot hold beside what
    /// others hold and are guaranteed.
    pub fn register_model_with(&mut self, model_id: &str, options: ModelOptions) -> Result<()> {
        let options = ModelOptions {
            capacity_bytes: whole_pages(options.capacity_bytes, self.pool.page_bytes()),
            ..options
        };
        Ok(self.pool.register_model_with(model_id, options)?)
    }

    /// Changes a model's guarantee, ceiling and priority at any time; see
    /// [`cuda_vmm::SharedMemoryPool::set_quota`]. New in 0.2.0.
    ///
    /// # Errors
    /// After an error nothing has changed.
    /// - [`ModelNotFound`](VmmError::ModelNotFound) if there is no such model.
    /// - [`Vmm`](VmmError::Vmm) with `QuotaUnsatisfiable` if the quota cannot hold.
    pub fn set_quota(&self, model_id: &str, quota: ModelQuota) -> Result<()> {
        Ok(self.pool.set_quota(model_id, quota)?)
    }

    /// Returns a model's guarantee, ceiling and priority; `None` if there is no such model. New in
    /// 0.2.0.
    pub fn quota(&self, model_id: &str) -> Option<ModelQuota> {
        self.pool.quota(model_id)
    }

    /// Allocates `size` bytes for a model and returns their address, a multiple of 256.
    ///
    /// A model may allocate any number of times. Its allocations never move.
    ///
    /// # Errors
    /// A failed allocation changes nothing.
    /// - [`ModelNotFound`](VmmError::ModelNotFound) if there is no such model.
    /// - [`Vmm`](VmmError::Vmm) with `ZeroSize` if `size` is 0.
    /// - [`OutOfVirtualMemory`](VmmError::OutOfVirtualMemory) if the model's range has no unused
    ///   run of that length.
    /// - [`OutOfPhysicalMemory`](VmmError::OutOfPhysicalMemory) if the limit, or the device's
    ///   memory, is exhausted.
    /// - [`Vmm`](VmmError::Vmm) if a driver call fails.
    pub fn allocate_for_model(&mut self, model_id: &str, size: usize) -> Result<usize> {
        let address = self.pool.allocate_for_model(model_id, size);
        Ok(address.map_err(VmmError::as_in_0_1_1)? as usize)
    }

    /// As [`allocate_for_model`](Self::allocate_for_model), but waits up to `timeout` for memory.
    /// New in 0.2.0.
    ///
    /// Other models are asked to free memory for it. Waiting calls are served by priority, then in
    /// the order of arrival. The call takes `&self`, so that other threads can use the pool
    /// meanwhile; they free their memory through [`core`](Self::core).
    ///
    /// # Errors
    /// As [`allocate_for_model`](Self::allocate_for_model).
    /// [`OutOfPhysicalMemory`](VmmError::OutOfPhysicalMemory) is returned when the timeout expires.
    /// It is returned at once if the request can never succeed, and if the device has no memory
    /// although the limit has room.
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

    /// Returns how many bytes a model is asked to free, because others need memory or because its
    /// ceiling was lowered. New in 0.2.0.
    ///
    /// Returns `None` if there is no such model. See [`cuda_vmm::VirtualMemoryPool::owed_bytes`],
    /// which takes no lock.
    pub fn owed_bytes(&self, model_id: &str) -> Option<usize> {
        self.pool.model_owed_bytes(model_id)
    }

    /// Sets a waker that is woken each time a model owes more; `None` removes it. New in 0.2.0.
    ///
    /// See [`cuda_vmm::VirtualMemoryPool::set_owed_waker`].
    ///
    /// # Errors
    /// [`ModelNotFound`](VmmError::ModelNotFound) if there is no such model.
    pub fn set_owed_waker(&self, model_id: &str, waker: Option<Waker>) -> Result<()> {
        self.pool.model(model_id)?.set_owed_waker(waker);
        Ok(())
    }

    /// Returns a model's unused memory to the driver, and returns how many bytes that were. New in
    /// 0.2.0.
    ///
    /// See [`cuda_vmm::VirtualMemoryPool::give_back`].
    ///
    /// # Errors
    /// - [`ModelNotFound`](VmmError::ModelNotFound) if there is no such model.
    /// - [`Vmm`](VmmError::Vmm) if a driver call fails.
    pub fn give_back(&self, model_id: &str) -> Result<usize> {
        Ok(self.pool.model(model_id)?.give_back()?)
    }

    /// Returns at least `bytes` bytes of unused memory to the driver, if the pool has as many, and
    /// returns how many bytes that were. New in 0.2.0.
    ///
    /// Call it when Candle has run out of memory; see [`relief`](crate::relief).
    pub fn relieve(&self, bytes: usize) -> usize {
        self.pool.relieve(bytes)
    }

    /// Frees `size` live bytes at `offset` from the model's base address: an allocation, a part of
    /// one, or several adjacent ones. Returns at once.
    ///
    /// # Errors
    /// A failed call frees nothing.
    /// - [`ModelNotFound`](VmmError::ModelNotFound) if there is no such model.
    /// - [`Vmm`](VmmError::Vmm) with `ZeroSize` if `size` is 0.
    /// - [`InvalidOffset`](VmmError::InvalidOffset) if the bytes lie outside of the model's
    ///   capacity, or `offset + size` overflows.
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
    /// returned, or at one inside such an allocation.
    ///
    /// # Errors
    /// As [`deallocate_for_model`](Self::deallocate_for_model), with the offset from the model's
    /// base address; [`NotMapped`](VmmError::NotMapped) with offset 0 for an address below that.
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

    /// Returns the address of the first byte of a model's range; `None` if there is no such model.
    ///
    /// [`deallocate_for_model`](Self::deallocate_for_model) takes the difference of an allocated
    /// address and this one.
    pub fn model_base_address(&self, model_id: &str) -> Option<usize> {
        let address = self.pool.model_base_address(model_id)?;
        Some(address as usize)
    }

    /// Returns a model's statistics of 0.1.1; `None` if there is no such model.
    pub fn get_model_stats(&self, model_id: &str) -> Option<MemoryStats> {
        self.pool.model_stats(model_id).map(MemoryStats::from)
    }

    /// Returns the statistics of 0.1.1 for all models together.
    pub fn global_stats(&self) -> GlobalMemoryStats {
        let models = self.pool.models().len();
        GlobalMemoryStats::new(self.pool.limit_bytes(), models, &self.pool.stats())
    }

    /// Unregisters a model and frees all its memory.
    ///
    /// # Errors
    /// [`ModelNotFound`](VmmError::ModelNotFound) if there is no such model.
    pub fn unregister_model(&mut self, model_id: &str) -> Result<()> {
        Ok(self.pool.unregister_model(model_id)?)
    }

    /// Returns how many bytes the device holds for this pool, by state. `Display` prints them.
    pub fn detailed_stats(&self) -> EngineStats {
        self.pool.stats()
    }

    /// Returns the pool of [`cuda_vmm`] inside, which has more functions, such as placement by
    /// offset and named streams. What it allocates and frees is this pool's.
    pub fn core(&self) -> &cuda_vmm::SharedMemoryPool {
        &self.pool
    }

    /// Converts an error of the core, and adds the model's capacity if the core's error lacks it.
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
