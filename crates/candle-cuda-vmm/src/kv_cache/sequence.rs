//! The caches of one sequence, which grow, shrink and are refused together.

use super::checks::{check_truncate, tokens_before};
use super::elastic::ElasticKvCache;
use super::traits::{KvCache, KvCacheFactory};
use crate::elastic_tensor::{ElasticTensor, RowsWatch, SharedRows, Waits};
use crate::error::{Result, VmmError};
use crate::tensor_pool::TensorPool;
use candle_core::{DType, Shape, Tensor};
use cuda_vmm::pool::Turn;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// The KV caches of one sequence, one for each layer of a model: a [`KvCacheFactory`] that knows
/// its caches. Cloning is cheap, and the clones are the same sequence.
///
/// [`reserve`](Self::reserve) allocates memory for the next tokens in all layers, or in none. Call
/// it before a step: then no layer can be refused memory in the middle of the model, and if the
/// memory is not there, the sequence can wait or be preempted while all its layers are alike.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_cuda_vmm::kv_cache::{KvCache, KvCacheFactory};
/// use candle_cuda_vmm::{EngineOptions, TensorPool, TensorPoolOptions};
///
/// # #[cfg(not(feature = "simulator"))]
/// # fn main() {}
/// # #[cfg(feature = "simulator")]
/// # fn main() -> candle_cuda_vmm::Result<()> {
/// let limit = EngineOptions::new().limit_bytes(16 << 20);
/// let pool = TensorPool::with_options(&Device::Cpu, TensorPoolOptions::new().engine(limit))?;
/// let sequence = pool.sequence().rows((1, 8, 64), (1, 8, 64), DType::F32)?;
/// let mut layers = [sequence.layer(0, 2, 4096)?, sequence.layer(1, 2, 4096)?];
///
/// sequence.reserve(1000)?; // 2 MB in each of four caches
/// for layer in &mut layers {
///     let tokens = Tensor::zeros((1, 8, 1000, 64), DType::F32, &Device::Cpu)?;
///     layer.append(&tokens, &tokens)?;
/// }
/// assert!(sequence.reserve(1000).is_ok() && sequence.reserve(3000).is_err());
/// assert_eq!((sequence.len(), sequence.bytes()), (1000, 16 << 20));
/// sequence.truncate(500)?;
/// sequence.reset();
/// assert_eq!(sequence.bytes(), 0);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Sequence {
    pub(super) pool: TensorPool,
    pub(super) layers: Arc<Mutex<BTreeMap<usize, SequenceCache>>>,
    pub(super) rows: Option<SequenceRows>,
}

/// What one token is in each cache, and where it lies.
#[derive(Debug, Clone)]
pub(super) enum SequenceRows {
    /// Keys and values of each layer have a range of their own.
    Apart { k: Shape, v: Shape, dtype: DType },
    /// All layers share a range. Columns `2 · l` and `2 · l + 1` are layer `l`.
    OneRange { rows: SharedRows, layers: usize },
}

impl SequenceRows {
    /// The range of all layers, if they share one.
    pub(super) fn shared(&self) -> Option<&SharedRows> {
        match self {
            Self::Apart { .. } => None,
            Self::OneRange { rows, .. } => Some(rows),
        }
    }

    /// The same, with another range of all layers, if they share one.
    pub(super) fn with_shared(&self, shared: Option<SharedRows>) -> Self {
        match (self, shared) {
            (Self::OneRange { layers, .. }, Some(rows)) => Self::OneRange {
                rows,
                layers: *layers,
            },
            (rows, _) => rows.clone(),
        }
    }
}

/// The cache of one layer of a [`Sequence`]. Cloning is cheap, and the clones are the same cache.
#[derive(Debug, Clone)]
pub struct SequenceCache {
    pub(super) pool: TensorPool,
    pub(super) cache: Arc<Mutex<ElasticKvCache>>,
}

impl SequenceCache {
    /// Locks the cache, for functions of [`ElasticKvCache`] that [`KvCache`] has not.
    ///
    /// Drop the guard before any function of the [`Sequence`] is called: those lock all caches.
    ///
    /// # Errors
    /// [`Vmm`](VmmError::Vmm) with `Forked` in a forked process, where the lock may never be
    /// released.
    pub fn lock(&self) -> Result<MutexGuard<'_, ElasticKvCache>> {
        lock(&self.pool, &self.cache)
    }
}

fn lock<'a, T>(pool: &TensorPool, mutex: &'a Mutex<T>) -> Result<MutexGuard<'a, T>> {
    pool.engine().device().driver().check_process()?;
    Ok(mutex.lock().unwrap_or_else(PoisonError::into_inner))
}

impl KvCache for SequenceCache {
    fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        KvCache::append(&mut *self.lock()?, k, v)
    }

    fn current_seq_len(&self) -> usize {
        self.lock().map_or(0, |cache| cache.current_seq_len())
    }

    fn position(&self) -> usize {
        self.lock().map_or(0, |cache| cache.position())
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        self.lock()?.truncate(len)
    }

    fn release_front(&mut self, tokens: usize) -> Result<()> {
        self.lock()?.release_front(tokens)
    }

    fn reset(&mut self) {
        if let Ok(mut cache) = self.lock() {
            cache.reset();
        }
    }
}

impl TensorPool {
    /// Makes a sequence without layers. A model makes its caches from it.
    pub fn sequence(&self) -> Sequence {
        Sequence {
            pool: self.clone(),
            layers: Arc::default(),
            rows: None,
        }
    }
}

/// A reservation that waits for memory; see [`Sequence::reserve_async`].
#[derive(Debug)]
#[must_use = "futures do nothing unless they are polled"]
pub struct SequenceReservation<'a> {
    sequence: &'a Sequence,
    tokens: usize,
    turn: Turn,
}

impl Future for SequenceReservation<'_> {
    type Output = Result<()>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let (sequence, tokens) = (self.sequence, self.tokens);
        let waits = Waits::InTurn(&mut self.turn, context.waker());
        match sequence.reserve_by(tokens, waits)? {
            true => Poll::Ready(Ok(())),
            false => Poll::Pending,
        }
    }
}

/// Wakes a thread that sleeps between two polls.
struct Unparks(Thread);

impl Wake for Unparks {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

impl KvCacheFactory for Sequence {
    type Cache = SequenceCache;

    /// Makes the cache of a layer, or returns the one that was made for it before.
    ///
    /// # Errors
    /// [`UnknownLayer`](VmmError::UnknownLayer) if the layers are in one range, and this one is not
    /// among them.
    fn layer(&self, layer: usize, dim: usize, max_seq_len: usize) -> Result<Self::Cache> {
        let mut layers = lock(&self.pool, &self.layers)?;
        if let Some(cache) = layers.get(&layer) {
            return Ok(cache.clone());
        }
        let mut cache = self.pool.kv_cache(dim, max_seq_len);
        match &self.rows {
            None => {}
            Some(SequenceRows::Apart { k, v, dtype }) => {
                cache.k_cache_mut().set_rows(k, *dtype)?;
                cache.v_cache_mut().set_rows(v, *dtype)?;
            }
            Some(SequenceRows::OneRange { rows, layers }) => {
                let layers = *layers;
                if layer >= layers {
                    return Err(VmmError::UnknownLayer { layer, layers });
                }
                let [k, v] = [2 * layer, 2 * layer + 1].map(|it| rows.tensor(it, max_seq_len));
                cache.k_cache_mut().take_rows(k?);
                cache.v_cache_mut().take_rows(v?);
            }
        }
        let cache = SequenceCache {
            pool: self.pool.clone(),
            cache: Arc::new(Mutex::new(cache)),
        };
        layers.insert(layer, cache.clone());
        Ok(cache)
    }
}

impl Sequence {
    /// Says what one token is in the caches that are made from now on: the shape of keys and of
    /// values without the dimension of the sequence, such as `(batch, heads, head_dim)`, and the
    /// dtype. So memory can be reserved before the first tokens come.
    ///
    /// # Errors
    /// As [`TensorPool::tensor`].
    pub fn rows(mut self, k: impl Into<Shape>, v: impl Into<Shape>, dtype: DType) -> Result<Self> {
        let (k, v) = (k.into(), v.into());
        // Checked here, so that no layer finds it wrong.
        self.pool.tensor(&k, dtype)?;
        self.pool.tensor(&v, dtype)?;
        self.rows = Some(SequenceRows::Apart { k, v, dtype });
        Ok(self)
    }

    /// As [`rows`](Self::rows), and puts all tokens of `layers` layers into one range of addresses,
    /// instead of a range for keys and another for values of each layer.
    ///
    /// A token then lies in one piece, `[layers, keys and values, batch, heads, head_dim]` if keys
    /// and values have one shape. Use it for many short sequences, because it rounds their memory
    /// up to whole pages once, and not for keys and for values of each layer. With 32 layers of 8
    /// heads of 128 in F16 a token is 128 KiB, and takes 2 MiB instead of 128 MiB.
    ///
    /// A token of 64 KiB to 1 MiB that is a multiple of 8 KiB gets 2 KiB of padding, so that
    /// attention over one layer uses all of the memory's channels.
    ///
    /// The caches work as those of ranges of their own do, with these differences:
    /// - Memory follows the layer that has most tokens. Only what no layer needs is freed, at the
    ///   end and by [`release_front`](ElasticKvCache::release_front) at the front. So layers with
    ///   windows of different lengths are better apart.
    /// - On a CUDA device keys and values are strided views, a token's keys from those of the next
    ///   as far apart as tokens are. [`gqa`](crate::attention::gqa) reads them in place, and one
    ///   launch appends them. A view holds the pages of its tokens, those of all layers.
    /// - If a view of a layer shows what an append after a truncation would overwrite, the tokens
    ///   of all layers move. Views of other layers may count if they are older than the truncation.
    /// - First tokens of another shape or dtype get ranges of their own.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_cuda_vmm::TensorPool;
    /// use candle_cuda_vmm::kv_cache::{KvCache, KvCacheFactory};
    ///
    /// # #[cfg(not(feature = "simulator"))]
    /// # fn main() {}
    /// # #[cfg(feature = "simulator")]
    /// # fn main() -> candle_cuda_vmm::Result<()> {
    /// let pool = TensorPool::new(&Device::Cpu)?;
    /// let token = (1, 8, 128); // batch, heads, head size
    /// let sequence = pool.sequence().rows_in_one_range(32, token, token, DType::F16)?;
    /// for layer in 0..32 {
    ///     let tokens = Tensor::zeros((1, 8, 1, 128), DType::F16, &Device::Cpu)?;
    ///     sequence.layer(layer, 2, 8192)?.append(&tokens, &tokens)?;
    /// }
    /// assert_eq!((sequence.len(), sequence.bytes()), (1, 2 << 20));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`TensorPool::tensor`], for the tokens of all layers; `ZeroSize` if there are no layers.
    pub fn rows_in_one_range(
        mut self,
        layers: usize,
        k: impl Into<Shape>,
        v: impl Into<Shape>,
        dtype: DType,
    ) -> Result<Self> {
        if layers == 0 {
            return Err(cuda_vmm::VmmError::ZeroSize { what: "layers" }.into());
        }
        let (k, v) = (k.into(), v.into());
        let shapes = (0..layers).flat_map(|_| [k.clone(), v.clone()]);
        let rows = SharedRows::new(&self.pool, shapes, dtype)?;
        self.rows = Some(SequenceRows::OneRange { rows, layers });
        Ok(self)
    }

    /// Locks all caches, in the order of the layers, and does something with them.
    pub(super) fn with_layers<T>(
        &self,
        act: impl FnOnce(&mut [(usize, MutexGuard<'_, ElasticKvCache>)]) -> Result<T>,
    ) -> Result<T> {
        let layers = lock(&self.pool, &self.layers)?;
        let mut caches = Vec::with_capacity(layers.len());
        for (layer, cache) in layers.iter() {
            caches.push((*layer, cache.lock()?));
        }
        act(&mut caches)
    }

    /// Allocates memory for the next `tokens` tokens in all layers, or after an error in none.
    /// Waits for retiring memory, if that is enough.
    ///
    /// Appending up to that many tokens then needs no memory. Memory that is reserved and not used
    /// stays until [`truncate`](Self::truncate) or [`reset`](Self::reset).
    ///
    /// # Errors
    /// After an error all layers are as before.
    /// - [`UnknownShape`](VmmError::UnknownShape) for a layer that has had no tokens yet, unless
    ///   [`rows`](Self::rows) said what a token is.
    /// - [`Vmm`](VmmError::Vmm) with `OutOfPhysicalMemory` if the memory is not to be had: it says
    ///   how much all layers need.
    /// - Any error of [`ElasticTensor::reserve_together`].
    pub fn reserve(&self, tokens: usize) -> Result<()> {
        self.reserve_by(tokens, Waits::ForRetiring).map(drop)
    }

    /// As [`reserve`](Self::reserve), but does not wait for memory that retires.
    ///
    /// If the rows of a layer move to new addresses, it may wait for the device's work on the old
    /// ones, as [`ElasticTensor::append`] does.
    ///
    /// # Errors
    /// As [`reserve`](Self::reserve).
    pub fn try_reserve(&self, tokens: usize) -> Result<()> {
        self.reserve_by(tokens, Waits::Never).map(drop)
    }

    /// As [`reserve`](Self::reserve), but waits up to `timeout` for memory, also for what other
    /// accounts are asked to give back. Other threads may use the sequence meanwhile.
    ///
    /// # Errors
    /// As [`reserve`](Self::reserve).
    pub fn reserve_timeout(&self, tokens: usize, timeout: Duration) -> Result<()> {
        // How long the thread sleeps at most before it looks what the device has finished with.
        const LOOK: Duration = Duration::from_millis(1);
        let started = Instant::now();
        let waker = Waker::from(Arc::new(Unparks(thread::current())));
        let mut context = Context::from_waker(&waker);
        let mut reservation = Box::pin(self.reserve_async(tokens));
        loop {
            if let Poll::Ready(reserved) = reservation.as_mut().poll(&mut context) {
                return reserved;
            }
            let left = timeout.saturating_sub(started.elapsed());
            if left.is_zero() {
                // It stands in the line for the same memory.
                drop(reservation);
                return self.try_reserve(tokens);
            }
            thread::park_timeout(left.min(LOOK));
            self.pool.engine().step();
        }
    }

    /// As [`reserve`](Self::reserve), as a future that waits as long as it is polled, also for what
    /// other accounts are asked to give back. It needs no runtime, and stands in the same line as
    /// threads do; see [`VirtualMemoryPool::allocate_async`]. Others may use the sequence
    /// meanwhile.
    ///
    /// [`VirtualMemoryPool::allocate_async`]: cuda_vmm::VirtualMemoryPool::allocate_async
    ///
    /// # Errors
    /// As [`reserve`](Self::reserve).
    pub fn reserve_async(&self, tokens: usize) -> SequenceReservation<'_> {
        SequenceReservation {
            sequence: self,
            tokens,
            turn: self.pool.account().turn(),
        }
    }

    /// Returns whether the memory is reserved; if not, the turn is to be tried again.
    fn reserve_by(&self, tokens: usize, waits: Waits<'_>) -> Result<bool> {
        self.with_layers(|caches| {
            let mut tensors = Vec::with_capacity(2 * caches.len());
            for (layer, cache) in caches {
                let rows = cache.rows_mut()?;
                tensors.extend(rows.ok_or(VmmError::UnknownShape { layer: *layer })?);
            }
            ElasticTensor::reserve_by(&mut tensors, tokens, waits)
        })
    }

    /// Keeps the first `len` tokens of all layers and drops the rest. Also makes layers alike that
    /// an error has left with different numbers of tokens.
    ///
    /// # Errors
    /// As [`ElasticTensor::truncate`] if a layer has fewer tokens; then no layer has changed.
    pub fn truncate(&self, len: usize) -> Result<()> {
        self.with_layers(|caches| {
            for (_, cache) in caches.iter() {
                check_truncate(cache.current_seq_len(), len)?;
            }
            (caches.iter_mut()).try_for_each(|(_, cache)| cache.truncate(len))
        })
    }

    /// Drops the tokens from a position on, in all layers. Use it instead of
    /// [`truncate`](Self::truncate) if layers have released tokens, and so have different lengths.
    ///
    /// # Errors
    /// As [`KvCache::truncate_to_position`] if a layer has no such position; then no layer has
    /// changed.
    pub fn truncate_to_position(&self, position: usize) -> Result<()> {
        self.with_layers(|caches| {
            for (_, cache) in caches.iter() {
                tokens_before(position, cache.position(), cache.current_seq_len())?;
            }
            (caches.iter_mut()).try_for_each(|(_, cache)| cache.truncate_to_position(position))
        })
    }

    /// Drops all tokens of all layers and frees their memory. Does nothing in a forked process.
    pub fn reset(&self) {
        let reset = self.with_layers(|caches| {
            caches.iter_mut().for_each(|(_, cache)| cache.reset());
            Ok(())
        });
        reset.unwrap_or_default();
    }

    /// Returns the number of tokens that all layers have; 0 without layers, and in a forked
    /// process.
    pub fn len(&self) -> usize {
        let len = self.with_layers(|caches| {
            let lengths = caches.iter().map(|(_, cache)| cache.current_seq_len());
            Ok(lengths.min().unwrap_or(0))
        });
        len.unwrap_or(0)
    }

    /// Returns the position that all layers have reached: tokens that a layer has released count. 0
    /// without layers, and in a forked process.
    pub fn position(&self) -> usize {
        let position = self.with_layers(|caches| {
            let positions = caches.iter().map(|(_, cache)| cache.position());
            Ok(positions.min().unwrap_or(0))
        });
        position.unwrap_or(0)
    }

    /// Returns whether a layer has no tokens, or there are no layers.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the bytes of device memory that are allocated for all layers: whole pages, with what
    /// is reserved, and without what views of dropped tokens still hold. 0 in a forked process.
    pub fn bytes(&self) -> usize {
        let bytes = self.with_layers(|caches| {
            let rows = caches.iter().flat_map(|(_, cache)| cache.all_rows());
            Ok(ElasticTensor::allocated_together(rows))
        });
        bytes.unwrap_or(0)
    }

    /// Watches whether the tokens of all layers stay at their addresses, for steps that are
    /// captured.
    ///
    /// # Errors
    /// [`UnknownShape`](VmmError::UnknownShape) for a layer that has had no tokens yet. Otherwise
    /// as [`ElasticTensor::watch`].
    pub fn watch(&self) -> Result<RowsWatch> {
        self.with_layers(|caches| {
            for (layer, cache) in caches.iter() {
                if cache.all_rows().next().is_none() {
                    return Err(VmmError::UnknownShape { layer: *layer });
                }
            }
            let tensors = caches.iter().flat_map(|(_, cache)| cache.all_rows());
            RowsWatch::of(self.pool.device(), tensors)
        })
    }

    /// Returns the pool.
    pub fn pool(&self) -> &TensorPool {
        &self.pool
    }
}
