//! Many models under one physical limit.
//!
//! # Safety
//! Nothing unsafe is done here. [`SharedMemoryPool::compact_model`] is unsafe to call, as its caller promises what the
//! `&mut` of [`VirtualMemoryPool::compact`] stands for: others may have the model too.
#![allow(unsafe_code)]

use super::{ModelQuota, PoolStats, Snapshot, VirtualMemoryPool};
use crate::engine::{CompactReport, Engine, EngineOptions, EngineStats, PoolOptions};
use crate::process::Here;
use crate::size::check_page_bytes;
use crate::sync::{Arc, RwLock};
use crate::{Device, Result, VmmError};
use std::collections::BTreeMap;

/// Addresses that are placed for a model begin at a multiple of this many bytes, as those of `cuMemAlloc` do.
pub(super) const ALIGNMENT: usize = 256;

/// How a shared pool is made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SharedPoolOptions {
    /// The engine behind it: the limit, the headroom, what stays parked.
    pub engine: EngineOptions,
    /// The page of every model in bytes; the device's granularity if none is given.
    pub page_bytes: Option<usize>,
}

impl SharedPoolOptions {
    /// The defaults: those of the engine, and the device's granularity as the page.
    pub const fn new() -> Self {
        Self {
            engine: EngineOptions::new(),
            page_bytes: None,
        }
    }

    /// With these options of the engine.
    pub const fn engine(mut self, engine: EngineOptions) -> Self {
        self.engine = engine;
        self
    }

    /// With pages of this many bytes.
    pub const fn page_bytes(mut self, bytes: usize) -> Self {
        self.page_bytes = Some(bytes);
        self
    }
}

/// How a model is registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelOptions {
    /// Its addresses in bytes.
    pub capacity_bytes: usize,
    /// Memory in bytes that is always to be had for it, whatever other models do.
    pub guarantee_bytes: usize,
    /// The most memory in bytes that it may hold, if less than the pool's limit.
    pub ceiling_bytes: Option<usize>,
    /// Who is served first when several wait for memory, and asked last to give some back: the higher. 0 unless told
    /// otherwise; any number.
    pub priority: i32,
    /// How much memory in bytes is made ahead of its latest allocation; see
    /// [`PoolOptions::ahead_bytes_max`].
    pub ahead_bytes_max: usize,
    /// When the worker begins again to make memory ahead; see [`PoolOptions::ahead_bytes_min`].
    pub ahead_bytes_min: Option<usize>,
}

impl ModelOptions {
    /// Addresses, no guarantee, no ceiling, priority 0, nothing made ahead.
    pub const fn new(capacity_bytes: usize) -> Self {
        Self {
            capacity_bytes,
            guarantee_bytes: 0,
            ceiling_bytes: None,
            priority: 0,
            ahead_bytes_max: 0,
            ahead_bytes_min: None,
        }
    }
}

type Models = BTreeMap<String, Arc<VirtualMemoryPool>>;

/// Models that share one budget, each with a range of addresses of its own; a cheap clone.
///
/// ```
/// # #[cfg(feature = "simulator")] {
/// use cuda_vmm::{Driver, SharedMemoryPool};
///
/// let device = Driver::detect()?.device(0)?;
/// let pool = SharedMemoryPool::new(&device, 8 << 30)?; // 8 GiB of memory for all models
/// pool.register_model("chat", 64 << 30)?; // 64 GiB of addresses
/// pool.register_model("code", 64 << 30)?;
///
/// let address = pool.allocate_for_model("chat", 6 << 30)?;
/// let error = pool.allocate_for_model("code", 4 << 30).unwrap_err();
/// assert!(error.is_retryable()); // it fits once `chat` has freed 2 GiB
/// assert_eq!(error.shortfall_bytes(), 2 << 30);
///
/// pool.deallocate_for_model_address("chat", address, 6 << 30)?;
/// pool.allocate_for_model("code", 4 << 30)?;
/// # }
/// # Ok::<(), cuda_vmm::VmmError>(())
/// ```
///
/// A model's memory is charged to it until the device holds it no longer. What one model gives back, any
/// other can have.
///
/// What comes to another model by way of the cache ([`EngineOptions::cache_bytes_max`]) is overwritten with zeros before,
/// behind the last work of the first. All else goes back to the driver and is made anew; drivers clear it, and CUDA does not
/// promise that they do. So no model finds another's bytes where it allocates. That is no wall between models: they share a
/// context, in which a kernel can use any mapped address.
#[derive(Debug, Clone)]
pub struct SharedMemoryPool {
    engine: Engine,
    page_bytes: usize,
    models: Arc<Here<RwLock<Models>>>,
}

impl SharedMemoryPool {
    /// A pool with a limit in bytes, which may exceed the device's memory. Pages are the device's
    /// granularity, and each has a chunk of its own, so that whatever one model frees another can have.
    ///
    /// # Errors
    /// [`VmmError::ZeroSize`] for a limit of 0.
    pub fn new(device: &Device, limit_bytes: usize) -> Result<Self> {
        Self::with_options(
            device,
            SharedPoolOptions::new().engine(
                EngineOptions::new()
                    .limit_bytes(limit_bytes)
                    .chunk_bytes_max(0),
            ),
        )
    }

    /// A pool as the options say.
    ///
    /// # Errors
    /// As [`Engine::new`]; [`VmmError::InvalidPageSize`].
    pub fn with_options(device: &Device, options: SharedPoolOptions) -> Result<Self> {
        let granularity_bytes = device.granularity_bytes();
        let page_bytes = options.page_bytes.unwrap_or(granularity_bytes);
        check_page_bytes(page_bytes, granularity_bytes)?;
        Ok(Self {
            engine: Engine::new(device, options.engine)?,
            page_bytes,
            models: Arc::new(Here::new(device.driver().process(), RwLock::default())),
        })
    }

    /// Registers a model with this many bytes of addresses, which cost no memory.
    ///
    /// # Errors
    /// [`VmmError::ModelAlreadyRegistered`]; otherwise as [`VirtualMemoryPool::new`].
    pub fn register_model(&self, model: &str, capacity_bytes: usize) -> Result<()> {
        self.register_model_with(model, ModelOptions::new(capacity_bytes))
    }

    /// Registers a model with a guarantee, a ceiling and a priority.
    ///
    /// # Errors
    /// As [`register_model`](Self::register_model); [`VmmError::QuotaUnsatisfiable`] if the guarantee is
    /// above the ceiling or cannot hold beside the others, or if `ahead_bytes_min` is above `ahead_bytes_max`.
    pub fn register_model_with(&self, model: &str, options: ModelOptions) -> Result<()> {
        let already = || VmmError::ModelAlreadyRegistered {
            model: model.to_owned(),
        };
        if self.models.read()?.contains_key(model) {
            return Err(already());
        }
        let quota = ModelQuota {
            guarantee_bytes: options.guarantee_bytes,
            ceiling_bytes: options.ceiling_bytes,
            priority: options.priority,
        };
        let mut ahead = PoolOptions::new().ahead_bytes_max(options.ahead_bytes_max);
        ahead.ahead_bytes_min = options.ahead_bytes_min;
        let pool = VirtualMemoryPool::with_quota(
            &self.engine,
            options.capacity_bytes,
            self.page_bytes,
            ahead,
            quota.into(),
        )?;
        let mut models = self.models.write()?;
        if models.contains_key(model) {
            // Another thread was faster. The pool is dropped, which calls the driver, after the lock.
            drop(models);
            return Err(already());
        }
        models.insert(model.to_owned(), Arc::new(pool));
        Ok(())
    }

    /// Forgets a model and gives back all that it holds, waiting for the device, and for allocations of other threads that are
    /// under way. It does not wait for one that [makes room](Device::set_make_room) on the device, nor at all for other threads
    /// if it is called from there or by a subscriber of `tracing` in the middle of an engine's work: what is left then goes
    /// when that work ends.
    ///
    /// Handles from [`model`](Self::model) then answer [`VmmError::Closed`].
    ///
    /// # Errors
    /// [`VmmError::ModelNotFound`]; the driver's, if it refused: the model is gone all the same, and what
    /// is left is retried.
    pub fn unregister_model(&self, model: &str) -> Result<()> {
        let removed = self.models.write()?.remove(model);
        removed.ok_or_else(|| not_found(model))?.shut()
    }

    pub(super) fn find(&self, model: &str) -> Result<Arc<VirtualMemoryPool>> {
        let models = self.models.read()?;
        models.get(model).cloned().ok_or_else(|| not_found(model))
    }

    /// The model's own range.
    ///
    /// # Errors
    /// [`VmmError::ModelNotFound`].
    pub fn model(&self, model: &str) -> Result<Arc<VirtualMemoryPool>> {
        self.find(model)
    }

    /// Makes `bytes` bytes live at the model's lowest unused address, a multiple of 256 from its base, and
    /// returns the address.
    ///
    /// # Errors
    /// [`VmmError::ModelNotFound`]; otherwise as [`VirtualMemoryPool::allocate_anywhere`].
    pub fn allocate_for_model(&self, model: &str, bytes: usize) -> Result<u64> {
        self.find(model)?.allocate_anywhere(bytes, ALIGNMENT)
    }

    /// Makes `bytes` bytes live at an offset of the model's range, and returns their address.
    ///
    /// # Errors
    /// [`VmmError::ModelNotFound`]; otherwise as [`VirtualMemoryPool::allocate`].
    pub fn allocate_for_model_at(&self, model: &str, offset: usize, bytes: usize) -> Result<u64> {
        self.find(model)?.allocate(offset, bytes)
    }

    /// Ends the life of bytes at an offset of the model's range.
    ///
    /// # Errors
    /// [`VmmError::ModelNotFound`]; otherwise as [`VirtualMemoryPool::deallocate`].
    pub fn deallocate_for_model(&self, model: &str, offset: usize, bytes: usize) -> Result<()> {
        self.find(model)?.deallocate(offset, bytes)
    }

    /// As [`deallocate_for_model`](Self::deallocate_for_model), by address.
    ///
    /// # Errors
    /// As there; [`VmmError::NotMapped`] for an address below the model's base, with the offset 0.
    pub fn deallocate_for_model_address(
        &self,
        model: &str,
        address: u64,
        bytes: usize,
    ) -> Result<()> {
        let pool = self.find(model)?;
        match address.checked_sub(pool.base_address()) {
            Some(offset) => pool.deallocate(offset as usize, bytes),
            None => Err(VmmError::NotMapped { offset: 0, bytes }),
        }
    }

    /// The first address of a model's range; none in a forked process.
    pub fn model_base_address(&self, model: &str) -> Option<u64> {
        self.find(model).ok().map(|pool| pool.base_address())
    }

    /// A model's numbers; none in a forked process.
    pub fn model_stats(&self, model: &str) -> Option<PoolStats> {
        self.find(model).ok().map(|pool| pool.stats())
    }

    /// The names of the models, in order; none in a forked process.
    pub fn models(&self) -> Vec<String> {
        let models = self.models.read();
        models.map_or(Vec::new(), |models| models.keys().cloned().collect())
    }

    /// The numbers of the budget and of every model at one moment: no call of another thread comes between, so that
    /// what the models hold and what is no model's add up to what the engine holds.
    ///
    /// Makes no driver calls. All zero except the limit in a forked process. Takes the engine's lock for as long as it takes to count the runs of live bytes.
    pub fn snapshot(&self) -> Snapshot {
        let names = self.models.read().map_or(Vec::new(), |models| {
            let names = models.iter().map(|(name, pool)| (name.clone(), pool.key()));
            names.collect()
        });
        Snapshot::of(&self.engine, names)
    }

    /// The numbers of the budget.
    pub fn stats(&self) -> EngineStats {
        self.engine.stats()
    }

    /// The limit in bytes, as it was given.
    pub fn limit_bytes(&self) -> usize {
        self.engine.limit_bytes()
    }

    /// The page of every model in bytes.
    pub fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// Gives back what is not live and the device has finished with; returns the bytes.
    ///
    /// # Errors
    /// As [`Engine::trim`].
    pub fn trim(&self) -> Result<usize> {
        self.engine.trim()
    }

    /// Gives back a model's slack by moving its live pages to chunks that fit, at unchanged addresses; see
    /// [`VirtualMemoryPool::compact`]. Other models go on meanwhile.
    ///
    /// There is slack only where [`EngineOptions::chunk_bytes_max`] of the pool is more than a page; with
    /// [`new`](Self::new) it is not.
    ///
    /// # Errors
    /// [`VmmError::ModelNotFound`]; otherwise as [`VirtualMemoryPool::compact`].
    ///
    /// # Safety
    /// No work that uses the model's memory may be launched, by anyone, from the beginning of the call to its end: pages are
    /// unmapped for a moment, and what is written to the old memory after it was copied is lost. Work that was queued
    /// before, on the streams that were named for the model or on any where none was, is waited for.
    pub unsafe fn compact_model(&self, model: &str) -> Result<CompactReport> {
        self.find(model)?.compact_promised()
    }

    /// What [`compact_model`](Self::compact_model) would move and give back now. Makes no driver calls.
    pub fn model_compact_report(&self, model: &str) -> Option<CompactReport> {
        self.find(model).ok().map(|pool| pool.compact_report())
    }

    /// The engine behind the pool, on which further ranges can be made.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }
}

fn not_found(model: &str) -> VmmError {
    VmmError::ModelNotFound {
        model: model.to_owned(),
    }
}
