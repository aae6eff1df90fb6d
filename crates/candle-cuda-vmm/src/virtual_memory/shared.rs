//! Many models under one limit of physical memory.

use super::pages::whole_pages;
use super::stats::{GlobalMemoryStats, MemoryStats};
use crate::device::core_device;
use crate::error::{Result, VmmError};
use crate::tensor_pool::{TensorPool, TensorPoolOptions};
use candle_core::Device;
use cuda_vmm::{Account, EngineStats, PoolOptions, Quota};
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

/// Models that share one limit of physical memory on one device, each with its own range of
/// addresses.
///
/// Each model is an [`Account`], which all that it holds is charged to: its range here, and the
/// tensors, caches and blocks of [`tensor_pool`](Self::tensor_pool).
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
///
/// Tensors of two models under one limit:
///
/// ```
/// # #[cfg(feature = "simulator")] {
/// use candle_core::{DType, Device};
/// use candle_cuda_vmm::{Quota, SharedMemoryPool, TensorPoolOptions};
///
/// let mut shared = SharedMemoryPool::new(24 << 20, Device::Cpu)?;
/// shared.register_model_with("chat", 1 << 30, Quota::new().guarantee_bytes(8 << 20))?;
/// shared.register_model("code", 1 << 30)?;
/// let chat = shared.tensor_pool("chat", TensorPoolOptions::new())?;
/// let code = shared.tensor_pool("code", TensorPoolOptions::new())?;
///
/// let mut rows = code.tensor(1 << 18, DType::F32)?; // a megabyte each
/// rows.grow(16)?;
/// assert!(rows.grow(2).is_err()); // the rest is kept for `chat`
/// chat.tensor(1 << 18, DType::F32)?.grow(8)?;
/// # }
/// # Ok::<(), candle_cuda_vmm::VmmError>(())
/// ```
pub struct SharedMemoryPool {
    pool: cuda_vmm::SharedMemoryPool,
    device: Device,
    ranges: RwLock<Ranges>,
}

/// The range of each model.
type Ranges = BTreeMap<String, Arc<cuda_vmm::VirtualMemoryPool>>;

/// Allocated addresses are multiples of this, as those of `cuMemAlloc` are.
const ALIGNMENT: usize = 256;

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
        let core = core_device(&device)?;
        Ok(Self {
            pool: cuda_vmm::SharedMemoryPool::new(&core, physical_limit)?,
            device,
            ranges: RwLock::default(),
        })
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
        self.register_model_with(model_id, virtual_capacity, Quota::new())
    }

    /// As [`register_model`](Self::register_model), with a guarantee, a ceiling and a priority. New
    /// in 0.2.0.
    ///
    /// # Errors
    /// As [`register_model`](Self::register_model), and [`Vmm`](VmmError::Vmm) with
    /// `QuotaUnsatisfiable` if the guarantee is above the ceiling, or cannot hold beside what
    /// others hold and are guaranteed.
    pub fn register_model_with(
        &mut self,
        model_id: &str,
        virtual_capacity: usize,
        quota: Quota,
    ) -> Result<()> {
        let page_bytes = self.pool.page_bytes();
        let capacity_bytes = whole_pages(virtual_capacity, page_bytes);
        let account = self.pool.register_model(model_id, quota)?;
        let range = cuda_vmm::VirtualMemoryPool::on_account(
            &account,
            capacity_bytes,
            page_bytes,
            PoolOptions::new(),
        );
        match range {
            Ok(range) => {
                self.write(|ranges| ranges.insert(model_id.to_owned(), Arc::new(range)))?;
                Ok(())
            }
            Err(error) => {
                self.pool.unregister_model(model_id)?;
                Err(error.into())
            }
        }
    }

    /// Returns the account of a model: its quota, what it owes, what is available to it. New in
    /// 0.2.0.
    ///
    /// # Errors
    /// [`ModelNotFound`](VmmError::ModelNotFound) if there is no such model.
    pub fn model(&self, model_id: &str) -> Result<Account> {
        Ok(self.pool.model(model_id)?)
    }

    /// Returns the range of addresses of a model, with which other threads can allocate and free
    /// memory of it. New in 0.2.0.
    ///
    /// # Errors
    /// [`ModelNotFound`](VmmError::ModelNotFound) if there is no such model.
    pub fn range(&self, model_id: &str) -> Result<Arc<cuda_vmm::VirtualMemoryPool>> {
        self.check_process()?;
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let range = ranges.get(model_id).cloned();
        range.ok_or_else(|| VmmError::ModelNotFound(model_id.to_owned()))
    }

    /// Makes a pool for tensors, caches and blocks whose memory is charged to a model. New in
    /// 0.2.0.
    ///
    /// The engine options among `options` are not used: the limit is this pool's.
    ///
    /// # Errors
    /// - [`ModelNotFound`](VmmError::ModelNotFound) if there is no such model.
    /// - Any error of [`TensorPool::on_account`].
    pub fn tensor_pool(&self, model_id: &str, options: TensorPoolOptions) -> Result<TensorPool> {
        let account = self.pool.model(model_id)?;
        TensorPool::on_account(&self.device, &account, options)
    }

    /// Fails in a forked process, where the lock may never be released.
    fn check_process(&self) -> Result<()> {
        Ok(self.pool.engine().device().driver().check_process()?)
    }

    fn write<T>(&self, change: impl FnOnce(&mut Ranges) -> T) -> Result<T> {
        self.check_process()?;
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        Ok(change(&mut ranges))
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
        let address = self.range(model_id)?.allocate_anywhere(size, ALIGNMENT);
        Ok(address.map_err(VmmError::as_in_0_1_1)? as usize)
    }

    /// As [`allocate_for_model`](Self::allocate_for_model), but waits up to `timeout` for memory.
    /// New in 0.2.0.
    ///
    /// Other models are asked to free memory for it. Waiting calls are served by priority, then in
    /// the order of arrival. The call takes `&self`, so that other threads can use the pool
    /// meanwhile; they free their memory through [`range`](Self::range).
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
        let range = self.range(model_id)?;
        let address = range.allocate_anywhere_timeout(size, ALIGNMENT, timeout);
        Ok(address.map_err(VmmError::as_in_0_1_1)? as usize)
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
        let range = self.range(model_id)?;
        let freed = range.deallocate(offset, size);
        freed.map_err(|error| with_capacity(&range, error))
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
        let range = self.range(model_id)?;
        let base = range.base_address() as usize;
        let offset = address.checked_sub(base);
        let offset = offset.ok_or(VmmError::NotMapped { offset: 0, size })?;
        let freed = range.deallocate(offset, size);
        freed.map_err(|error| with_capacity(&range, error))
    }

    /// Returns the address of the first byte of a model's range; `None` if there is no such model.
    ///
    /// [`deallocate_for_model`](Self::deallocate_for_model) takes the difference of an allocated
    /// address and this one.
    pub fn model_base_address(&self, model_id: &str) -> Option<usize> {
        let range = self.range(model_id).ok()?;
        Some(range.base_address() as usize)
    }

    /// Returns the statistics of 0.1.1 for a model's range; `None` if there is no such model. What
    /// its tensors, caches and blocks hold is in those of its [account](Self::model).
    pub fn get_model_stats(&self, model_id: &str) -> Option<MemoryStats> {
        let range = self.range(model_id).ok()?;
        Some(MemoryStats::from(range.stats()))
    }

    /// Returns the statistics of 0.1.1 for all models together.
    pub fn global_stats(&self) -> GlobalMemoryStats {
        let models = self.pool.models().len();
        GlobalMemoryStats::new(self.pool.limit_bytes(), models, &self.pool.stats())
    }

    /// Unregisters a model and frees all memory of its range; while another thread holds the
    /// [`range`](Self::range), that is done when it drops it. What tensors, caches and blocks of
    /// the model hold stays until they are dropped; they get no more.
    ///
    /// # Errors
    /// [`ModelNotFound`](VmmError::ModelNotFound) if there is no such model;
    /// [`Vmm`](VmmError::Vmm) if the driver refused memory of the range. The model is gone all the
    /// same, and what is left is retried.
    pub fn unregister_model(&mut self, model_id: &str) -> Result<()> {
        let range = self.write(|ranges| ranges.remove(model_id))?;
        self.pool.unregister_model(model_id)?;
        // Without the lock: it waits for the device.
        let closed = range.and_then(Arc::into_inner).map(|range| range.close());
        Ok(closed.unwrap_or(Ok(()))?)
    }

    /// Returns how many bytes the device holds for this pool, by state. `Display` prints them.
    pub fn detailed_stats(&self) -> EngineStats {
        self.pool.stats()
    }

    /// Returns the pool of [`cuda_vmm`] inside, which has more functions, such as a limit that
    /// changes at run time. Its models are this pool's; register and unregister them here, so that
    /// each has its range.
    pub fn core(&self) -> &cuda_vmm::SharedMemoryPool {
        &self.pool
    }
}

/// Converts an error of the core, and adds the range's capacity if the core's error lacks it.
fn with_capacity(range: &cuda_vmm::VirtualMemoryPool, error: cuda_vmm::VmmError) -> VmmError {
    match VmmError::from(error) {
        VmmError::InvalidOffset { offset, size, .. } => VmmError::InvalidOffset {
            offset,
            size,
            capacity: range.capacity_bytes(),
        },
        error => error,
    }
}
