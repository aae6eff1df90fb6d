//! A KV cache that grows where it stands.

use super::{KvCache, KvCacheFactory, check_pair, check_truncate};
#[cfg(feature = "cuda")]
use crate::append::Queued;
use crate::elastic_tensor::ElasticTensor;
use crate::error::{Result, VmmError};
use crate::tensor_pool::TensorPool;
use candle_core::{Error, Tensor};
use std::sync::Arc;

/// The keys or the values of an [`ElasticKvCache`], as `candle_nn::kv_cache::Cache`.
///
/// They are kept token-major: `[seq, batch, heads, head_dim]` for a sequence in dimension 2, so that tokens follow one
/// another in memory.
#[derive(Debug)]
pub struct ElasticCache {
    pool: TensorPool,
    dim: usize,
    max_seq_len: usize,
    rows: Option<ElasticTensor>,
    /// Why a clone has no tokens.
    failed: Option<Arc<VmmError>>,
}

impl ElasticCache {
    fn new(pool: &TensorPool, dim: usize, max_seq_len: usize) -> Self {
        Self {
            pool: pool.clone(),
            dim,
            max_seq_len,
            rows: None,
            failed: None,
        }
    }

    /// The dimension of the sequence.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Tokens in the cache.
    pub fn current_seq_len(&self) -> usize {
        self.rows.as_ref().map_or(0, ElasticTensor::len)
    }

    /// How many tokens were expected when it was made.
    pub fn max_seq_len(&self) -> usize {
        self.max_seq_len
    }

    /// The tokens, token-major, once a first append has told their shape.
    pub fn rows(&self) -> Option<&ElasticTensor> {
        self.rows.as_ref()
    }

    fn answers_are_contiguous(&self) -> bool {
        self.pool.inner().options.contiguous_answers
    }

    fn check(&self) -> candle_core::Result<()> {
        match &self.failed {
            Some(reason) => Err(Error::WrappedContext {
                wrapped: Box::new(reason.clone()),
                context: format!("the cache could not be cloned: {reason}"),
            }),
            None => Ok(()),
        }
    }

    /// All tokens, with the sequence in dimension [`dim`](Self::dim): a transposed view of token-major memory. None if there
    /// are none.
    ///
    /// # Errors
    /// As [`ElasticTensor::view`].
    pub fn current_data(&self) -> candle_core::Result<Option<Tensor>> {
        self.check()?;
        match self.current_seq_len() {
            0 => Ok(None),
            _ => self.all().map(Some),
        }
    }

    /// All tokens, whose shape is known.
    fn all(&self) -> candle_core::Result<Tensor> {
        let Some(rows) = &self.rows else {
            return Err(Error::Msg("no tokens were appended".to_owned()));
        };
        let (dim, rank) = (self.dim, rows.row_dims().len() + 1);
        let order: Vec<_> = (1..=dim).chain([0]).chain(dim + 1..rank).collect();
        rows.view()?.permute(order)
    }

    /// Appends tokens, of any strides. The first ones tell shape and type.
    ///
    /// # Errors
    /// As [`ElasticTensor::append`]; `DimOutOfRange` for a tensor without the sequence's dimension. After an error the
    /// cache is as before.
    pub fn append(&mut self, tokens: &Tensor) -> candle_core::Result<()> {
        Ok(self.try_append(tokens)?)
    }

    /// As [`append`](Self::append), with this crate's errors.
    fn try_append(&mut self, tokens: &Tensor) -> Result<()> {
        self.check()?;
        let (dim, rank) = (self.dim, tokens.rank());
        if dim >= rank {
            let (shape, op) = (tokens.shape().clone(), "elastic-append");
            let dim = i32::try_from(dim).unwrap_or(i32::MAX);
            return Err(Error::DimOutOfRange { shape, dim, op }.into());
        }
        let order: Vec<_> = [dim]
            .into_iter()
            .chain(0..dim)
            .chain(dim + 1..rank)
            .collect();
        let rows = tokens.permute(order)?;
        if self.current_seq_len() == 0 {
            // Learned anew, as there is nothing that it must be like.
            let is_alike = |all: &ElasticTensor| {
                all.row_dims() == &rows.dims()[1..] && all.dtype() == rows.dtype()
            };
            if !self.rows.as_ref().is_some_and(is_alike) {
                let mut fresh = self.pool.tensor(&rows.dims()[1..], rows.dtype())?;
                fresh.append(&rows)?;
                self.rows = Some(fresh);
                return Ok(());
            }
        }
        match &mut self.rows {
            Some(all) => all.append(&rows),
            None => Ok(()),
        }
    }

    /// Forgets what was appended since there were `len` tokens, and the room that was made for more.
    fn undo(&mut self, len: usize) {
        if let Some(rows) = &mut self.rows {
            rows.undo(len);
        }
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        self.check()?;
        check_truncate(self.current_seq_len(), len)?;
        self.rows.as_mut().map_or(Ok(()), |rows| rows.truncate(len))
    }

    fn release_front(&mut self, tokens: usize) -> Result<()> {
        self.check()?;
        check_truncate(self.current_seq_len(), tokens)?;
        let rows = self.rows.as_mut();
        rows.map_or(Ok(()), |rows| rows.release_front(tokens))
    }

    /// Forgets all tokens and gives their memory back.
    pub fn reset(&mut self) {
        self.failed = None;
        if let Some(rows) = &mut self.rows {
            rows.clear();
        }
    }

    fn try_clone(&self) -> Result<Self> {
        self.check()?;
        let mut clone = Self::new(&self.pool, self.dim, self.max_seq_len);
        clone.rows = self
            .rows
            .as_ref()
            .map(ElasticTensor::try_clone)
            .transpose()?;
        Ok(clone)
    }
}

/// A KV cache with the methods, argument order, shapes and results of `candle_nn::kv_cache::KvCache`, and memory for the
/// tokens that are there.
///
/// What [`append`](Self::append) answers is of shape `[batch, heads, seq, head_dim]` (for a sequence in dimension 2), and a
/// transposed view of token-major memory, which [`gqa`](crate::attention::gqa) reads where it stands. Candle's `matmul` wants
/// its operands contiguous: call `contiguous()` before it, which copies, or let the pool answer
/// [contiguous copies](crate::TensorPoolOptions::contiguous_answers). Tensors that were answered are snapshots: they
/// stay as they are whatever happens to the cache afterwards, and hold their memory until they are dropped; see
/// [`ElasticTensor`].
///
/// On a CUDA device the tokens of a decode step are appended by one launch for keys and values together, if both are of one
/// shape and type, and each head's elements lie together in whole pieces of 16 bytes.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_cuda_vmm::{ElasticKvCache, TensorPool};
///
/// # fn main() -> candle_cuda_vmm::Result<()> {
/// let pool = TensorPool::new(&Device::Cpu)?;
/// let mut cache = ElasticKvCache::new(&pool, 2, 16);
/// let tokens = Tensor::ones((1, 8, 20, 64), DType::F32, &Device::Cpu)?;
/// cache.append(&tokens, &tokens)?; // more than was expected
/// cache.truncate(15)?;
/// cache.release_front(5)?;
/// assert_eq!(cache.k()?.map(|k| k.dims().to_vec()), Some(vec![1, 8, 10, 64]));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct ElasticKvCache {
    k: ElasticCache,
    v: ElasticCache,
}

impl ElasticKvCache {
    /// An empty cache whose sequence is dimension `dim`. Shape and type are those of the first tokens. `max_seq_len` is a
    /// hint and no limit: a cache grows as far as the pool reserves addresses.
    pub fn new(pool: &TensorPool, dim: usize, max_seq_len: usize) -> Self {
        let cache = || ElasticCache::new(pool, dim, max_seq_len);
        Self {
            k: cache(),
            v: cache(),
        }
    }

    /// The keys.
    pub fn k_cache(&self) -> &ElasticCache {
        &self.k
    }

    /// The values.
    pub fn v_cache(&self) -> &ElasticCache {
        &self.v
    }

    /// The keys, for changing.
    pub fn k_cache_mut(&mut self) -> &mut ElasticCache {
        &mut self.k
    }

    /// The values, for changing.
    pub fn v_cache_mut(&mut self) -> &mut ElasticCache {
        &mut self.v
    }

    /// All keys; none if there are none.
    ///
    /// # Errors
    /// As [`ElasticTensor::view`].
    pub fn k(&self) -> candle_core::Result<Option<Tensor>> {
        self.k.current_data()
    }

    /// All values; none if there are none.
    ///
    /// # Errors
    /// As [`ElasticTensor::view`].
    pub fn v(&self) -> candle_core::Result<Option<Tensor>> {
        self.v.current_data()
    }

    /// Appends the next tokens, and answers all keys and all values.
    ///
    /// # Errors
    /// As [`ElasticCache::append`]; `DTypeMismatchBinaryOp`, `DeviceMismatchBinaryOp` or `ShapeMismatchBinaryOp` for keys
    /// and values that differ in dtype, device, or a dimension other than the last, the number of tokens for instance.
    /// After an error keys and values are as before. [`VmmError::find`] has an error of this crate.
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
        Ok(self.try_append(k, v)?)
    }

    /// As [`append`](Self::append), with this crate's errors.
    fn try_append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        check_pair(k, v, self.k.dim, "elastic-append")?;
        let (k_len, v_len) = (self.k.current_seq_len(), self.v.current_seq_len());
        let outcome = self.append_or_fail(k, v);
        if outcome.is_err() {
            self.k.undo(k_len);
            self.v.undo(v_len);
        }
        outcome
    }

    /// Appends. After an error some of it may be there.
    fn append_or_fail(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        #[cfg(feature = "cuda")]
        match self.append_at_once(k, v)? {
            Queued::Not => {}
            Queued::Answers([k, v]) => return Ok((k, v)),
            Queued::Rows => return Ok(self.both()?),
        }
        self.k.try_append(k)?;
        self.v.try_append(v)?;
        Ok(self.both()?)
    }

    /// Appends keys and values by one launch, where these can be.
    #[cfg(feature = "cuda")]
    fn append_at_once(&mut self, k: &Tensor, v: &Tensor) -> Result<Queued> {
        let wants_answers = self.k.answers_are_contiguous();
        let dim = self.k.dim;
        match (&mut self.k.rows, &mut self.v.rows) {
            (Some(keys), Some(values)) => {
                ElasticTensor::append_both([(keys, k), (values, v)], dim, wants_answers)
            }
            _ => Ok(Queued::Not),
        }
    }

    /// All there is, once tokens, or none of a shape, were appended.
    fn both(&self) -> candle_core::Result<(Tensor, Tensor)> {
        let (k, v) = (self.k.all()?, self.v.all()?);
        match self.k.answers_are_contiguous() {
            true => Ok((k.force_contiguous()?, v.force_contiguous()?)),
            false => Ok((k, v)),
        }
    }

    /// Tokens in the cache.
    pub fn current_seq_len(&self) -> usize {
        self.k.current_seq_len()
    }

    /// Forgets all tokens and gives their memory back. Tensors that were answered stay as they are.
    pub fn reset(&mut self) {
        self.k.reset();
        self.v.reset();
    }

    /// Keeps the first `len` tokens.
    ///
    /// # Errors
    /// As [`ElasticTensor::truncate`].
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        // Both first, so that none is shortened if the other cannot be.
        check_truncate(self.v.current_seq_len(), len)?;
        self.k.truncate(len)?;
        self.v.truncate(len)
    }

    /// Forgets the first `tokens` tokens, as a sliding window does: the next answers begin behind them.
    ///
    /// # Errors
    /// As [`ElasticTensor::release_front`].
    pub fn release_front(&mut self, tokens: usize) -> Result<()> {
        check_truncate(self.v.current_seq_len(), tokens)?;
        self.k.release_front(tokens)?;
        self.v.release_front(tokens)
    }

    /// A cache of the same pool with copies of the tokens.
    ///
    /// # Errors
    /// As [`ElasticTensor::try_clone`].
    pub fn try_clone(&self) -> Result<Self> {
        Ok(Self {
            k: self.k.try_clone()?,
            v: self.v.try_clone()?,
        })
    }
}

/// Copies the tokens. Where that fails, for want of memory for instance, the clone answers the error until it is
/// [`reset`](Self::reset).
impl Clone for ElasticKvCache {
    fn clone(&self) -> Self {
        self.try_clone().unwrap_or_else(|error| {
            let error = Arc::new(error);
            let [k, v] = [&self.k, &self.v].map(|cache| ElasticCache {
                failed: Some(error.clone()),
                ..ElasticCache::new(&cache.pool, cache.dim, cache.max_seq_len)
            });
            Self { k, v }
        })
    }
}

impl KvCache for ElasticKvCache {
    fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        self.try_append(k, v)
    }

    fn current_seq_len(&self) -> usize {
        self.current_seq_len()
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        self.truncate(len)
    }

    fn reset(&mut self) {
        self.reset();
    }
}

/// All caches of a model share the pool's budget.
impl KvCacheFactory for TensorPool {
    type Cache = ElasticKvCache;

    fn layer(&self, _layer: usize, dim: usize, max_seq_len: usize) -> Result<Self::Cache> {
        Ok(self.kv_cache(dim, max_seq_len))
    }
}
