//! Many models under one physical limit.

use super::Snapshot;
use crate::engine::{Account, Engine, EngineOptions, EngineStats, Quota};
use crate::process::Here;
use crate::size::check_page_bytes;
use crate::sync::{Arc, RwLock};
use crate::{Device, Result, VmmError};
use std::collections::BTreeMap;

/// Options of a [`SharedMemoryPool`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SharedPoolOptions {
    /// Options of the engine: the limit, the headroom, what stays parked.
    pub engine: EngineOptions,
    /// The page size of all models in bytes; the device's granularity if none is given.
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

    /// Sets the options of the engine.
    pub const fn engine(mut self, engine: EngineOptions) -> Self {
        self.engine = engine;
        self
    }

    /// Sets the page size in bytes.
    pub const fn page_bytes(mut self, bytes: usize) -> Self {
        self.page_bytes = Some(bytes);
        self
    }
}

/// Models that share one budget; a cheap clone.
///
/// A model is an [`Account`] with a name. All that is made on it is charged to it: ranges of
/// addresses, tensors, caches, block tables.
///
/// ```
/// # #[cfg(feature = "simulator")] {
/// use cuda_vmm::{Driver, PoolOptions, Quota, SharedMemoryPool, VirtualMemoryPool};
///
/// let device = Driver::detect()?.device(0)?;
/// let shared = SharedMemoryPool::new(&device, 8 << 30)?; // 8 GiB of memory for all models
/// let chat = shared.register_model("chat", Quota::new().guarantee_bytes(1 << 30))?;
/// let code = shared.register_model("code", Quota::new())?;
///
/// // 64 GiB of addresses for each.
/// let page_bytes = shared.page_bytes();
/// let [chat, code] = [&chat, &code]
///     .map(|model| VirtualMemoryPool::on_account(model, 64 << 30, page_bytes, PoolOptions::new()));
/// let (chat, code) = (chat?, code?);
/// chat.allocate(0, 6 << 30)?;
/// let error = code.allocate(0, 4 << 30).unwrap_err();
/// assert!(error.is_retryable()); // it fits once `chat` has freed 2 GiB
/// assert_eq!(error.shortfall_bytes(), 2 << 30);
/// assert_eq!(chat.account().owed_bytes(), 2 << 30);
///
/// chat.deallocate(4 << 30, 2 << 30)?;
/// code.allocate(0, 4 << 30)?;
/// # }
/// # Ok::<(), cuda_vmm::VmmError>(())
/// ```
///
/// A model's memory is charged to it until the device holds it no longer. Memory that one model
/// gives back is free for any other.
///
/// Memory may come to another model through the cache ([`EngineOptions::cache_bytes_max`]). It is
/// overwritten with zeros before that, behind the last work of the first model. All other memory
/// goes back to the driver and is made anew. Drivers clear it, though CUDA does not promise it. So
/// no model finds another's bytes in what it allocates. That is no wall between models: they share
/// a context, in which a kernel can use any mapped address.
#[derive(Debug, Clone)]
pub struct SharedMemoryPool {
    engine: Engine,
    page_bytes: usize,
    /// Registered models stay open though no caller has a handle.
    models: Arc<Here<RwLock<BTreeMap<String, Account>>>>,
}

impl SharedMemoryPool {
    /// A pool with a limit in bytes, which may exceed the device's memory. The page size is the
    /// device's granularity, and each page is a chunk of its own. So each page that one model frees
    /// is free for another.
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

    /// A pool with these options.
    ///
    /// # Errors
    /// As [`Engine::new`]; [`VmmError::InvalidPageSize`] for a page size that is no power of two,
    /// or is below the device's granularity.
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

    /// Registers a model. It stays registered until [`unregister_model`](Self::unregister_model),
    /// whether the returned handle lives or not.
    ///
    /// # Errors
    /// As [`Engine::account`].
    pub fn register_model(&self, model: &str, quota: Quota) -> Result<Account> {
        let account = self.engine.account(model, quota)?;
        let mut models = self.models.write()?;
        let before = models.insert(model.to_owned(), account.clone());
        drop(models);
        // One that was closed by its handle. It goes without the lock.
        drop(before);
        Ok(account)
    }

    /// Forgets a model and [closes](Account::close) its account. The account gets no memory any
    /// more, and its live bytes stay until their owners free them.
    ///
    /// # Errors
    /// [`VmmError::ModelNotFound`] if no model has this name; [`VmmError::Forked`].
    pub fn unregister_model(&self, model: &str) -> Result<()> {
        let removed = self.models.write()?.remove(model);
        removed.ok_or_else(|| not_found(model))?.close();
        Ok(())
    }

    /// The account of a registered model.
    ///
    /// # Errors
    /// [`VmmError::ModelNotFound`] if no model has this name; [`VmmError::Forked`].
    pub fn model(&self, model: &str) -> Result<Account> {
        let models = self.models.read()?;
        models.get(model).cloned().ok_or_else(|| not_found(model))
    }

    /// The names of the models, in order; none in a forked process.
    pub fn models(&self) -> Vec<String> {
        let models = self.models.read();
        models.map_or(Vec::new(), |models| models.keys().cloned().collect())
    }

    /// The numbers of the budget and of every account on it at one moment; see
    /// [`Engine::snapshot`].
    pub fn snapshot(&self) -> Snapshot {
        self.engine.snapshot()
    }

    /// The numbers of the budget.
    pub fn stats(&self) -> EngineStats {
        self.engine.stats()
    }

    /// The limit in bytes that was set last.
    pub fn limit_bytes(&self) -> usize {
        self.engine.limit_bytes()
    }

    /// Changes the limit while models run; see [`Engine::set_limit_bytes`].
    ///
    /// # Errors
    /// As [`Engine::set_limit_bytes`].
    pub fn set_limit_bytes(&self, bytes: usize) -> Result<()> {
        self.engine.set_limit_bytes(bytes)
    }

    /// The page size that models are meant to use, in bytes.
    pub fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// Gives memory back that is not live and that the device has finished with. Returns the bytes.
    ///
    /// # Errors
    /// As [`Engine::trim`].
    pub fn trim(&self) -> Result<usize> {
        self.engine.trim()
    }

    /// Gives at least `bytes` bytes back to the driver if that much can be spared. Returns the
    /// bytes that were given back. See [`Engine::relieve`](crate::Engine::relieve).
    pub fn relieve(&self, bytes: usize) -> usize {
        self.engine.relieve(bytes)
    }

    /// The engine behind the pool.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }
}

fn not_found(model: &str) -> VmmError {
    VmmError::ModelNotFound {
        model: model.to_owned(),
    }
}
