//! Models by name: a pool with one range of addresses for each.

use cuda_vmm::{
    Account, CompactReport, Device, PoolOptions, PoolStats, Quota, Result, SharedMemoryPool,
    SharedPoolOptions, VirtualMemoryPool, VmmError,
};
use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Addresses that are placed for a model begin at a multiple of this many bytes.
const ALIGNMENT: usize = 256;

/// How a model is registered.
#[derive(Debug, Clone, Copy)]
pub struct ModelOptions {
    /// Its addresses in bytes.
    pub capacity_bytes: usize,
    pub guarantee_bytes: usize,
    pub ceiling_bytes: Option<usize>,
    pub priority: i32,
    pub ahead_bytes_max: usize,
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

type Ranges = BTreeMap<String, Arc<VirtualMemoryPool>>;

/// A pool whose models have one range each, found by the model's name; a cheap clone.
#[derive(Debug, Clone)]
pub struct Models {
    pool: SharedMemoryPool,
    /// Locked only to look a name up, never over a call of the pool.
    ranges: Arc<Mutex<Ranges>>,
}

impl Deref for Models {
    type Target = SharedMemoryPool;

    fn deref(&self) -> &SharedMemoryPool {
        &self.pool
    }
}

impl From<SharedMemoryPool> for Models {
    fn from(pool: SharedMemoryPool) -> Self {
        let ranges = Arc::default();
        Self { pool, ranges }
    }
}

impl Models {
    pub fn new(device: &Device, limit_bytes: usize) -> Result<Self> {
        SharedMemoryPool::new(device, limit_bytes).map(Self::from)
    }

    pub fn with_options(device: &Device, options: SharedPoolOptions) -> Result<Self> {
        SharedMemoryPool::with_options(device, options).map(Self::from)
    }

    fn ranges(&self) -> MutexGuard<'_, Ranges> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a model, and makes its range.
    pub fn register_model(&self, model: &str, capacity_bytes: usize) -> Result<()> {
        self.register_model_with(model, ModelOptions::new(capacity_bytes))
    }

    pub fn register_model_with(&self, model: &str, options: ModelOptions) -> Result<()> {
        let mut quota = Quota::new().guarantee_bytes(options.guarantee_bytes);
        (quota.ceiling_bytes, quota.priority) = (options.ceiling_bytes, options.priority);
        let mut ahead = PoolOptions::new().ahead_bytes_max(options.ahead_bytes_max);
        ahead.ahead_bytes_min = options.ahead_bytes_min;
        let account = self.pool.register_model(model, quota)?;
        let (bytes, page_bytes) = (options.capacity_bytes, self.page_bytes());
        let range = VirtualMemoryPool::on_account(&account, bytes, page_bytes, ahead);
        if range.is_err() {
            // Unless another thread has done so.
            _ = self.pool.unregister_model(model);
        }
        let before = self.ranges().insert(model.to_owned(), Arc::new(range?));
        drop(before);
        Ok(())
    }

    /// Closes a model's account, and its range unless a handle from [`model`](Self::model) lives:
    /// then the range ends with the last handle.
    pub fn unregister_model(&self, model: &str) -> Result<()> {
        self.pool.unregister_model(model)?;
        let range = self.ranges().remove(model);
        match range.and_then(Arc::into_inner) {
            Some(range) => range.close(),
            None => Ok(()),
        }
    }

    /// A model's range.
    pub fn model(&self, model: &str) -> Result<Arc<VirtualMemoryPool>> {
        let range = self.ranges().get(model).cloned();
        range.ok_or_else(|| not_found(model))
    }

    /// A model's account.
    pub fn account(&self, model: &str) -> Result<Account> {
        self.pool.model(model)
    }

    pub fn allocate_for_model(&self, model: &str, bytes: usize) -> Result<u64> {
        self.model(model)?.allocate_anywhere(bytes, ALIGNMENT)
    }

    pub fn allocate_for_model_at(&self, model: &str, offset: usize, bytes: usize) -> Result<u64> {
        self.model(model)?.allocate(offset, bytes)
    }

    pub fn allocate_for_model_timeout(
        &self,
        model: &str,
        bytes: usize,
        timeout: Duration,
    ) -> Result<u64> {
        let range = self.model(model)?;
        range.allocate_anywhere_timeout(bytes, ALIGNMENT, timeout)
    }

    pub fn deallocate_for_model(&self, model: &str, offset: usize, bytes: usize) -> Result<()> {
        self.model(model)?.deallocate(offset, bytes)
    }

    pub fn deallocate_for_model_address(
        &self,
        model: &str,
        address: u64,
        bytes: usize,
    ) -> Result<()> {
        let range = self.model(model)?;
        match address.checked_sub(range.base_address()) {
            Some(offset) => range.deallocate(offset as usize, bytes),
            None => Err(VmmError::NotMapped { offset: 0, bytes }),
        }
    }

    pub fn model_base_address(&self, model: &str) -> Option<u64> {
        self.model(model).ok().map(|range| range.base_address())
    }

    pub fn model_stats(&self, model: &str) -> Option<PoolStats> {
        self.model(model).ok().map(|range| range.stats())
    }

    pub fn set_quota(&self, model: &str, quota: Quota) -> Result<()> {
        self.account(model)?.set_quota(quota)
    }

    pub fn quota(&self, model: &str) -> Option<Quota> {
        self.account(model).ok()?.quota().ok()
    }

    pub fn model_owed_bytes(&self, model: &str) -> Option<usize> {
        self.account(model).ok().map(|account| account.owed_bytes())
    }

    /// Compacts a model's range, of which no handle lives. Meanwhile the model is not found.
    pub fn compact_model(&self, model: &str) -> Result<CompactReport> {
        let range = self.ranges().remove(model);
        let mut range = range.ok_or_else(|| not_found(model))?;
        let outcome = Arc::get_mut(&mut range).expect("no handle").compact();
        self.ranges().insert(model.to_owned(), range);
        outcome
    }

    pub fn model_compact_report(&self, model: &str) -> Option<CompactReport> {
        self.model(model).ok().map(|range| range.compact_report())
    }
}

fn not_found(model: &str) -> VmmError {
    VmmError::ModelNotFound {
        model: model.to_owned(),
    }
}
