//! What a model needs of a KV cache.

use crate::error::Result;
use candle_core::Tensor;

/// The keys and values of one layer.
///
/// Shapes are those of Candle's caches: the sequence is dimension `dim` of the input and of the
/// output, 2 for `[batch, heads, seq, head_dim]`. Errors are this crate's. A function that returns
/// Candle's [`Result`](candle_core::Result) can use `?` on them.
pub trait KvCache {
    /// Appends the next tokens, and returns all keys and all values, including the new ones.
    ///
    /// `k` and `v` may have any strides. The strides of the output are the cache's choice: a cache
    /// may return a transposed view of token-major memory, which [`gqa`](crate::attention::gqa)
    /// reads in place. A model whose operations need contiguous tensors calls `contiguous()`, which
    /// does nothing if the tensor already is.
    ///
    /// # Errors
    /// The cache's own errors: no memory, or a shape, dtype or device that differs from that of
    /// earlier tokens. All caches of this crate refuse keys and values that differ in dtype,
    /// device, or a dimension other than the last (Candle's `DTypeMismatchBinaryOp`,
    /// `DeviceMismatchBinaryOp`, `ShapeMismatchBinaryOp`). After any error their keys and values
    /// are unchanged.
    fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)>;

    /// Returns the number of tokens in the cache.
    fn current_seq_len(&self) -> usize;

    /// Keeps the first `len` tokens and drops the rest, as speculative decoding does with rejected
    /// tokens.
    ///
    /// # Errors
    /// Fails if there are fewer than `len` tokens (Candle's caches: `NarrowInvalidArgs`), and then
    /// changes nothing. Otherwise the cache's own errors.
    fn truncate(&mut self, len: usize) -> Result<()>;

    /// Drops all tokens.
    fn reset(&mut self);
}

/// Makes the KV caches of a model, one for each layer.
pub trait KvCacheFactory {
    /// The type of the caches.
    type Cache: KvCache;

    /// Makes an empty cache for layer `layer` of the model, counted from 0, with the sequence in
    /// dimension `dim`.
    ///
    /// `max_seq_len` is the number of tokens that the model expects at most. The cache decides what
    /// that costs, and whether more tokens are allowed.
    ///
    /// # Errors
    /// The cache's own errors. Candle's caches have none here.
    fn layer(&self, layer: usize, dim: usize, max_seq_len: usize) -> Result<Self::Cache>;
}
