//! A KV cache that grows in place.

use super::checks::{check_pair, check_release, check_truncate};
use super::traits::{KvCache, KvCacheFactory};
#[cfg(feature = "cuda")]
use crate::append::AppendOutcome;
use crate::elastic_tensor::{ElasticTensor, Live, RowsWatch};
use crate::error::{Result, VmmError};
use crate::tensor_pool::TensorPool;
use candle_core::{DType, Error, Shape, Tensor};
use std::sync::Arc;

/// The keys or the values of an [`ElasticKvCache`], with the methods of
/// `candle_nn::kv_cache::Cache`.
///
/// It stores tokens token-major, `[seq, batch, heads, head_dim]` for a sequence in dimension 2, so
/// that tokens follow one another in memory.
#[derive(Debug)]
pub struct ElasticCache {
    pool: TensorPool,
    dim: usize,
    max_seq_len: usize,
    rows: Option<ElasticTensor>,
    /// Tokens that were dropped at the front since the last reset.
    released: usize,
    /// The error of a clone that could not copy the tokens.
    failed: Option<Arc<VmmError>>,
}

impl ElasticCache {
    fn new(pool: &TensorPool, dim: usize, max_seq_len: usize) -> Self {
        Self {
            pool: pool.clone(),
            dim,
            max_seq_len,
            rows: None,
            released: 0,
            failed: None,
        }
    }

    /// Returns the dimension of the sequence.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Returns the number of tokens in the cache.
    pub fn current_seq_len(&self) -> usize {
        self.rows.as_ref().map_or(0, ElasticTensor::len)
    }

    /// Returns the position of the next token; see [`KvCache`].
    pub fn position(&self) -> usize {
        self.released + self.current_seq_len()
    }

    /// Returns the number of tokens that the cache was made for. It is no limit; see
    /// [`ElasticKvCache::new`].
    pub fn max_seq_len(&self) -> usize {
        self.max_seq_len
    }

    /// Returns the tokens, token-major; `None` before the first append.
    pub fn rows(&self) -> Option<&ElasticTensor> {
        self.rows.as_ref()
    }

    fn is_output_contiguous(&self) -> bool {
        self.pool.inner().options.contiguous_output
    }

    pub(super) fn check(&self) -> candle_core::Result<()> {
        match &self.failed {
            Some(reason) => Err(Error::WrappedContext {
                wrapped: Box::new(reason.clone()),
                context: format!("the cache could not be cloned: {reason}"),
            }),
            None => Ok(()),
        }
    }

    /// Returns all tokens, with the sequence in dimension [`dim`](Self::dim): a transposed view of
    /// token-major memory. `None` if there are no tokens.
    ///
    /// # Errors
    /// As [`ElasticTensor::view`].
    pub fn current_data(&self) -> candle_core::Result<Option<Tensor>> {
        self.check()?;
        match self.current_seq_len() {
            0 => Ok(None),
            _ => self.view().map(Some),
        }
    }

    /// Returns all tokens, whose shape must be known.
    fn view(&self) -> candle_core::Result<Tensor> {
        let Some(rows) = &self.rows else {
            return Err(Error::Msg("the cache has no tokens yet".to_owned()));
        };
        let (dim, rank) = (self.dim, rows.row_dims().len() + 1);
        let order: Vec<_> = (1..=dim).chain([0]).chain(dim + 1..rank).collect();
        rows.view()?.permute(order)
    }

    /// Appends tokens, of any strides. The first tokens set shape and dtype.
    ///
    /// # Errors
    /// After an error the cache is unchanged.
    /// - `DimOutOfRange` if the tensor has no dimension for the sequence.
    /// - Any error of [`ElasticTensor::append`].
    pub fn append(&mut self, tokens: &Tensor) -> candle_core::Result<()> {
        self.try_append(tokens)?;
        Ok(())
    }

    /// As [`append`](Self::append), with this crate's errors. Returns the tensor that was replaced,
    /// if the tokens have another shape or dtype.
    fn try_append(&mut self, tokens: &Tensor) -> Result<Option<Replaced>> {
        self.check()?;
        let (dim, rank) = (self.dim, tokens.rank());
        if dim >= rank {
            let (shape, op) = (tokens.shape().clone(), "elastic-append");
            let dim = i32::try_from(dim).unwrap_or(i32::MAX);
            return Err(Error::DimOutOfRange { shape, dim, op }.into());
        }
        let rows = token_major(dim, tokens)?;
        if self.current_seq_len() == 0 {
            // An empty cache takes the shape and dtype of the new tokens.
            let has_same_rows = |all: &ElasticTensor| {
                all.row_dims() == &rows.dims()[1..] && all.dtype() == rows.dtype()
            };
            if !self.rows.as_ref().is_some_and(has_same_rows) {
                let mut fresh = self.tensor(&rows.dims()[1..], rows.dtype())?;
                fresh.append(&rows)?;
                return Ok(Some(Replaced(self.rows.replace(fresh))));
            }
        }
        if let Some(all) = &mut self.rows {
            all.append(&rows)?;
        }
        Ok(None)
    }

    /// Makes the tensor of an empty cache, for tokens of this shape.
    pub(super) fn set_rows(&mut self, row: &Shape, dtype: DType) -> Result<()> {
        self.rows = Some(self.tensor(row, dtype)?);
        Ok(())
    }

    /// Takes a tensor for the tokens of an empty cache.
    pub(super) fn take_rows(&mut self, rows: ElasticTensor) {
        self.rows = Some(rows);
    }

    /// Makes a tensor with addresses for the tokens that the cache was made for.
    fn tensor(&self, row: impl Into<Shape>, dtype: DType) -> Result<ElasticTensor> {
        ElasticTensor::expecting(&self.pool, row, dtype, Some(self.max_seq_len))
    }

    /// The same cache, at the same position, with other memory for its tokens.
    fn with_rows(&self, rows: Option<ElasticTensor>) -> Self {
        Self {
            rows,
            released: self.released,
            ..Self::new(&self.pool, self.dim, self.max_seq_len)
        }
    }

    /// The tokens and the memory of the cache now.
    fn mark(&self) -> Mark {
        let live = self.rows.as_ref().map(ElasticTensor::live);
        Mark {
            len: self.current_seq_len(),
            live: live.unwrap_or_default(),
            replaced: None,
        }
    }

    /// Drops the tokens that came after a mark, and frees the memory that was allocated for them.
    fn undo(&mut self, mark: Mark) {
        if let Some(Replaced(rows)) = mark.replaced {
            self.rows = rows;
        } else if let Some(rows) = &mut self.rows {
            rows.undo(mark.len, &mark.live);
        }
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        self.check()?;
        check_truncate(self.current_seq_len(), len)?;
        self.rows.as_mut().map_or(Ok(()), |rows| rows.truncate(len))
    }

    fn release_front(&mut self, tokens: usize) -> Result<()> {
        self.check()?;
        check_release(self.current_seq_len(), tokens)?;
        let rows = self.rows.as_mut();
        rows.map_or(Ok(()), |rows| rows.release_front(tokens))?;
        self.released += tokens;
        Ok(())
    }

    /// Drops all tokens and frees their memory.
    pub fn reset(&mut self) {
        self.failed = None;
        self.released = 0;
        if let Some(rows) = &mut self.rows {
            rows.clear();
        }
    }

    fn try_clone(&self) -> Result<Self> {
        self.check()?;
        let rows = self.rows.as_ref().map(ElasticTensor::try_clone);
        Ok(self.with_rows(rows.transpose()?))
    }
}

/// Returns tokens with the sequence in dimension 0 instead of `dim`, as rows have it.
pub(super) fn token_major(dim: usize, tokens: &Tensor) -> candle_core::Result<Tensor> {
    let order: Vec<_> = [dim]
        .into_iter()
        .chain(0..dim)
        .chain(dim + 1..tokens.rank())
        .collect();
    tokens.permute(order)
}

/// What a cache was before tokens are appended.
pub(super) struct Mark {
    len: usize,
    live: Live,
    /// What the append has replaced.
    replaced: Option<Replaced>,
}

/// The tensor that a cache had, if any, before tokens of another shape or dtype came.
struct Replaced(Option<ElasticTensor>);

/// A KV cache with the methods, argument order, shapes and results of
/// `candle_nn::kv_cache::KvCache`, and memory for the tokens in it only.
///
/// [`append`](Self::append) returns tensors of shape `[batch, heads, seq, head_dim]` (for a
/// sequence in dimension 2). They are transposed views of token-major memory, which
/// [`gqa`](crate::attention::gqa) reads in place. Candle's `matmul` needs contiguous operands. Call
/// `contiguous()` before it, which copies, or let the pool return [contiguous
/// copies](crate::TensorPoolOptions::contiguous_output).
///
/// Returned tensors are snapshots: no later call on the cache changes them, and their memory is
/// held until they are dropped; see [`ElasticTensor`].
///
/// On a CUDA device one launch appends the keys and values of a decode step, if both have one shape
/// and dtype and each head's elements are contiguous in multiples of 16 bytes.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_cuda_vmm::{ElasticKvCache, TensorPool};
///
/// # #[cfg(not(feature = "simulator"))]
/// # fn main() {}
/// # #[cfg(feature = "simulator")]
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
    /// Makes an empty cache with the sequence in dimension `dim`.
    ///
    /// The first tokens set shape and dtype. `max_seq_len` is a hint and no limit: the cache
    /// reserves addresses for that many tokens. If more come, all tokens move to a range of twice
    /// their size, and so on up to the pool's
    /// [`reservation_bytes`](crate::TensorPoolOptions::reservation_bytes) for keys and for values.
    /// A move copies the tokens, and holds their memory twice while it does. In all, moves copy at
    /// most two tokens for each that is appended.
    pub fn new(pool: &TensorPool, dim: usize, max_seq_len: usize) -> Self {
        let cache = || ElasticCache::new(pool, dim, max_seq_len);
        Self {
            k: cache(),
            v: cache(),
        }
    }

    /// Returns the keys.
    pub fn k_cache(&self) -> &ElasticCache {
        &self.k
    }

    /// Returns the values.
    pub fn v_cache(&self) -> &ElasticCache {
        &self.v
    }

    /// Returns the keys, mutable.
    pub fn k_cache_mut(&mut self) -> &mut ElasticCache {
        &mut self.k
    }

    /// Returns the values, mutable.
    pub fn v_cache_mut(&mut self) -> &mut ElasticCache {
        &mut self.v
    }

    /// Returns all keys; `None` if there are none.
    ///
    /// # Errors
    /// As [`ElasticTensor::view`].
    pub fn k(&self) -> candle_core::Result<Option<Tensor>> {
        self.k.current_data()
    }

    /// Returns all values; `None` if there are none.
    ///
    /// # Errors
    /// As [`ElasticTensor::view`].
    pub fn v(&self) -> candle_core::Result<Option<Tensor>> {
        self.v.current_data()
    }

    /// Appends the next tokens, and returns all keys and all values.
    ///
    /// # Errors
    /// After an error keys and values are unchanged. [`VmmError::find`] returns the error of this
    /// crate inside.
    /// - `DTypeMismatchBinaryOp`, `DeviceMismatchBinaryOp` or `ShapeMismatchBinaryOp` if keys and
    ///   values differ in dtype, device, or a dimension other than the last. The number of tokens
    ///   is such a dimension.
    /// - Any error of [`ElasticCache::append`].
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
        Ok(self.try_append(k, v)?)
    }

    /// As [`append`](Self::append), with this crate's errors.
    fn try_append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        check_pair(k, v, self.k.dim, "elastic-append")?;
        let mut marks = self.marks();
        let outcome = self.append_or_fail(k, v, &mut marks);
        if outcome.is_err() {
            self.undo(marks);
        }
        outcome
    }

    /// Appends. After an error a part may have been appended, and the marks say of what.
    fn append_or_fail(
        &mut self,
        k: &Tensor,
        v: &Tensor,
        [k_mark, v_mark]: &mut [Mark; 2],
    ) -> Result<(Tensor, Tensor)> {
        #[cfg(feature = "cuda")]
        match self.append_in_one_launch(k, v)? {
            AppendOutcome::Unsupported => {}
            AppendOutcome::Contiguous([k, v]) => return Ok((k, v)),
            AppendOutcome::Appended => return Ok(self.output()?),
        }
        k_mark.replaced = self.k.try_append(k)?;
        v_mark.replaced = self.v.try_append(v)?;
        Ok(self.output()?)
    }

    /// What the cache is now.
    pub(super) fn marks(&self) -> [Mark; 2] {
        [self.k.mark(), self.v.mark()]
    }

    /// Drops what came after the marks, and frees the memory that was allocated for it.
    pub(super) fn undo(&mut self, [k_mark, v_mark]: [Mark; 2]) {
        self.k.undo(k_mark);
        self.v.undo(v_mark);
    }

    /// Appends keys and values by one launch, if possible.
    #[cfg(feature = "cuda")]
    fn append_in_one_launch(&mut self, k: &Tensor, v: &Tensor) -> Result<AppendOutcome> {
        let contiguous = self.k.is_output_contiguous();
        let dim = self.k.dim;
        match (&mut self.k.rows, &mut self.v.rows) {
            (Some(keys), Some(values)) => {
                ElasticTensor::append_both([(keys, k), (values, v)], dim, contiguous)
            }
            _ => Ok(AppendOutcome::Unsupported),
        }
    }

    /// Returns views of all keys and values, as [`output`](Self::output).
    pub(super) fn views(&self) -> candle_core::Result<(Tensor, Tensor)> {
        Ok((self.k.view()?, self.v.view()?))
    }

    pub(super) fn is_output_contiguous(&self) -> bool {
        self.k.is_output_contiguous()
    }

    /// Returns all keys and values. Something must have been appended before, at least an empty
    /// tensor of some shape.
    fn output(&self) -> candle_core::Result<(Tensor, Tensor)> {
        let (k, v) = self.views()?;
        match self.is_output_contiguous() {
            true => Ok((k.force_contiguous()?, v.force_contiguous()?)),
            false => Ok((k, v)),
        }
    }

    /// Returns the number of tokens in the cache.
    pub fn current_seq_len(&self) -> usize {
        self.k.current_seq_len()
    }

    /// Returns the position of the next token; see [`KvCache`].
    pub fn position(&self) -> usize {
        self.k.position()
    }

    /// Returns the tensors of keys and values; `None` if their shapes are not known yet.
    pub(super) fn rows_mut(&mut self) -> Result<Option<[&mut ElasticTensor; 2]>> {
        self.check()?;
        let (k, v) = (self.k.rows.as_mut(), self.v.rows.as_mut());
        Ok(k.zip(v).map(|(k, v)| [k, v]))
    }

    /// Returns the bytes of device memory that are allocated for keys and values: whole pages. For
    /// a layer of a [sequence in one range](crate::Sequence::rows_in_one_range) these are the bytes
    /// of all its layers.
    pub fn allocated_bytes(&self) -> usize {
        ElasticTensor::allocated_together(self.all_rows())
    }

    /// Returns the error of a clone that could not copy the tokens.
    pub(super) fn check(&self) -> candle_core::Result<()> {
        self.k.check()?;
        self.v.check()
    }

    /// The same cache with other tokens, one tensor for each of [`all_rows`](Self::all_rows).
    pub(super) fn with_rows(&self, rows: &mut impl Iterator<Item = ElasticTensor>) -> Self {
        let mut next =
            |cache: &ElasticCache| cache.with_rows(cache.rows.as_ref().and_then(|_| rows.next()));
        Self {
            k: next(&self.k),
            v: next(&self.v),
        }
    }

    /// Returns the tensors of keys and values that there are.
    pub(super) fn all_rows(&self) -> impl Iterator<Item = &ElasticTensor> {
        [&self.k, &self.v]
            .into_iter()
            .filter_map(ElasticCache::rows)
    }

    /// Watches whether the tokens stay at their addresses, for steps that are captured.
    ///
    /// # Errors
    /// [`UnknownShape`](VmmError::UnknownShape), with layer 0, if there were no tokens yet.
    /// Otherwise as [`ElasticTensor::watch`].
    pub fn watch(&self) -> Result<RowsWatch> {
        match self.all_rows().next() {
            Some(rows) => RowsWatch::of(rows.device(), self.all_rows()),
            None => Err(VmmError::UnknownShape { layer: 0 }),
        }
    }

    /// Drops all tokens and frees their memory. Tensors that were returned before are unchanged.
    pub fn reset(&mut self) {
        self.k.reset();
        self.v.reset();
    }

    /// Keeps the first `len` tokens and drops the rest.
    ///
    /// # Errors
    /// As [`ElasticTensor::truncate`].
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        // Checked first, so that an error changes neither.
        check_truncate(self.v.current_seq_len(), len)?;
        self.k.truncate(len)?;
        self.v.truncate(len)
    }

    /// Drops the first `tokens` tokens, as a sliding window does. Later output begins with the
    /// tokens after them.
    ///
    /// # Errors
    /// As [`ElasticTensor::release_front`].
    pub fn release_front(&mut self, tokens: usize) -> Result<()> {
        check_release(self.v.current_seq_len(), tokens)?;
        self.k.release_front(tokens)?;
        self.v.release_front(tokens)
    }

    /// Makes a cache of the same pool with copies of the tokens, and the same position.
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

/// Copies the tokens. If that fails, for example for lack of memory, the clone returns the error
/// from each call until it is [`reset`](Self::reset).
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

    fn position(&self) -> usize {
        self.position()
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        self.truncate(len)
    }

    fn release_front(&mut self, tokens: usize) -> Result<()> {
        self.release_front(tokens)
    }

    fn reset(&mut self) {
        self.reset();
    }
}

impl TensorPool {
    /// Makes an empty KV cache with the sequence in dimension `dim`; see [`ElasticKvCache::new`].
    pub fn kv_cache(&self, dim: usize, max_seq_len: usize) -> ElasticKvCache {
        ElasticKvCache::new(self, dim, max_seq_len)
    }
}

/// All caches of a model share the pool's budget.
impl KvCacheFactory for TensorPool {
    type Cache = ElasticKvCache;

    fn layer(&self, _layer: usize, dim: usize, max_seq_len: usize) -> Result<Self::Cache> {
        Ok(self.kv_cache(dim, max_seq_len))
    }
}
