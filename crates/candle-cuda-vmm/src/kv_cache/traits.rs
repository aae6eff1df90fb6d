//! What a model needs of a KV cache.

use super::checks::tokens_before;
use crate::error::Result;
use candle_core::Tensor;

/// The keys and values of one layer.
///
/// Shapes are those of Candle's caches: the sequence is dimension `dim` of the input and of the
/// output, 2 for `[batch, heads, seq, head_dim]`. Errors are this crate's. A function that returns
/// Candle's [`Result`](candle_core::Result) can use `?` on them.
///
/// # Lengths and positions
/// The length, [`current_seq_len`](Self::current_seq_len), counts the tokens in the cache. The
/// [`position`](Self::position) is that of the next token in the whole sequence. It also counts the
/// tokens that [`release_front`](Self::release_front) has dropped, so a model takes its rotary
/// embedding from it. Without released tokens the two are equal.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_cuda_vmm::kv_cache::{ConcatCaches, KvCache, KvCacheFactory};
///
/// # fn main() -> candle_cuda_vmm::Result<()> {
/// let mut cache = ConcatCaches.layer(0, 2, 4096)?;
/// let tokens = Tensor::zeros((1, 8, 10, 64), DType::F32, &Device::Cpu)?;
/// cache.append(&tokens, &tokens)?;
/// cache.release_front(4)?; // a window of 6
/// assert_eq!((cache.current_seq_len(), cache.position()), (6, 10));
/// cache.truncate_to_position(7)?; // the last three were rejected
/// assert_eq!((cache.current_seq_len(), cache.position()), (3, 7));
/// # Ok(())
/// # }
/// ```
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

    /// Returns the position of the next token: the number of tokens that were appended and not
    /// truncated, including released ones. [`reset`](Self::reset) sets it to 0.
    fn position(&self) -> usize;

    /// Keeps the first `len` tokens and drops the rest, as speculative decoding does with rejected
    /// tokens.
    ///
    /// # Errors
    /// Fails if there are fewer than `len` tokens (Candle's caches: `NarrowInvalidArgs`), and then
    /// changes nothing. Otherwise the cache's own errors.
    fn truncate(&mut self, len: usize) -> Result<()>;

    /// Drops the tokens from a position on. The next token then has that position.
    ///
    /// # Errors
    /// Candle's `NarrowInvalidArgs` if the position is before the first token in the cache or after
    /// the next token, and then nothing changes: `shape` is the next token's position, `start` the
    /// first token's, `len` the given one. Otherwise as [`truncate`](Self::truncate).
    fn truncate_to_position(&mut self, position: usize) -> Result<()> {
        let len = tokens_before(position, self.position(), self.current_seq_len())?;
        self.truncate(len)
    }

    /// Drops the first `tokens` tokens, as a sliding window does. The position stays.
    ///
    /// A cache over elastic memory frees that of whole pages. Candle's caches copy the remaining
    /// tokens.
    ///
    /// # Errors
    /// As [`truncate`](Self::truncate), if there are fewer tokens.
    fn release_front(&mut self, tokens: usize) -> Result<()>;

    /// Drops all tokens. The next token has position 0.
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
