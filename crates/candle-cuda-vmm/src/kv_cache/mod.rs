//! A way in for models: what a model asks of a KV cache, and who makes one for each layer.
//!
//! A model that is generic over [`KvCacheFactory`] keeps Candle's caches as its default and runs with any other
//! that implements [`KvCache`].
//!
//! **For models you own**, that is a type and a constructor: the field's type becomes `C: KvCache`, and
//! `KvCache::new(2, max_seq_len)` becomes `factory.layer(layer, 2, max_seq_len)?`. **Models of
//! `candle-transformers`** make their caches inside, where nobody can reach them. They need a small upstream change, of
//! which `docs/UPSTREAM.md` in the repository is a description.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use candle_cuda_vmm::kv_cache::{KvCache, KvCacheFactory, PreallocatedCaches};
//! # use candle_cuda_vmm::Result;
//!
//! struct Attention<C> {
//!     cache: C,
//! }
//!
//! impl<C: KvCache> Attention<C> {
//!     fn new<F: KvCacheFactory<Cache = C>>(factory: &F, layer: usize) -> Result<Self> {
//!         let cache = factory.layer(layer, 2, 4096)?;
//!         Ok(Self { cache })
//!     }
//!
//!     fn forward(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
//!         self.cache.append(k, v) // all there is by now
//!     }
//! }
//!
//! # fn main() -> Result<()> {
//! let mut attention = Attention::new(&PreallocatedCaches, 0)?;
//! let token = Tensor::zeros((1, 8, 1, 64), candle_core::DType::F32, &Device::Cpu)?;
//! attention.forward(&token, &token)?;
//! let (k, _) = attention.forward(&token, &token)?;
//! assert_eq!(k.dims(), [1, 8, 2, 64]);
//! # Ok(())
//! # }
//! ```

mod concat;
mod elastic;
mod preallocated;

pub use concat::ConcatCaches;
pub use elastic::{ElasticCache, ElasticKvCache};
pub use preallocated::PreallocatedCaches;

use crate::error::Result;
use candle_core::{Error, Tensor};

/// The keys and values of one layer, as a model uses them.
///
/// The shapes are those of Candle's caches: the sequence is dimension `dim` of what comes in and goes out, 2 for
/// `[batch, heads, seq, head_dim]`. Errors are this crate's, which a function that answers Candle's
/// [`Result`](candle_core::Result) takes with `?` as well.
pub trait KvCache {
    /// Appends the next tokens, and answers all keys and all values, the new ones included.
    ///
    /// `k` and `v` may have any strides. Those of what is answered are the cache's own: a cache may answer a
    /// transposed view of token-major memory, which [`gqa`](crate::attention::gqa) reads where it stands. A model
    /// whose operations want contiguous tensors calls `contiguous()`, which is free where there is nothing to do.
    ///
    /// # Errors
    /// The cache's own: memory that is not to be had, or a shape, dtype or device unlike that of the tokens before. For
    /// all caches of this crate: keys and values that differ in dtype, device, or a dimension other than the last
    /// (Candle's `DTypeMismatchBinaryOp`, `DeviceMismatchBinaryOp`, `ShapeMismatchBinaryOp`), and after any error keys and
    /// values are as before.
    fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)>;

    /// Tokens in the cache.
    fn current_seq_len(&self) -> usize;

    /// Forgets the tokens from `len` on, as speculative decoding does with those that were rejected.
    ///
    /// # Errors
    /// If there are fewer than `len` tokens (Candle's `NarrowInvalidArgs`, from Candle's caches), and then nothing
    /// changes; the cache's own.
    fn truncate(&mut self, len: usize) -> Result<()>;

    /// Forgets all tokens.
    fn reset(&mut self);
}

/// Makes the caches of a model, one for each layer.
pub trait KvCacheFactory {
    /// What it makes.
    type Cache: KvCache;

    /// An empty cache for layer `layer` of the model, counted from 0, whose sequence is dimension `dim`.
    ///
    /// `max_seq_len` is how many tokens the model expects at most. What it costs and whether it may be
    /// passed is the cache's affair.
    ///
    /// # Errors
    /// The cache's own. Candle's caches are made without any.
    fn layer(&self, layer: usize, dim: usize, max_seq_len: usize) -> Result<Self::Cache>;
}

/// Refuses a length beyond the tokens that there are.
fn check_truncate(tokens: usize, len: usize) -> Result<()> {
    if len <= tokens {
        return Ok(());
    }
    Err(Error::NarrowInvalidArgs {
        shape: tokens.into(),
        dim: 0,
        start: 0,
        len,
        msg: "truncate to more tokens than there are",
    }
    .into())
}

/// Refuses keys and values that do not belong together: of other types, devices or shapes, except for the size of a head.
fn check_pair(k: &Tensor, v: &Tensor, dim: usize, op: &'static str) -> candle_core::Result<()> {
    if dim >= k.rank() {
        let dim = i32::try_from(dim).unwrap_or(i32::MAX);
        let shape = k.shape().clone();
        return Err(Error::DimOutOfRange { shape, dim, op });
    }
    if k.dtype() != v.dtype() {
        let (lhs, rhs) = (k.dtype(), v.dtype());
        return Err(Error::DTypeMismatchBinaryOp { lhs, rhs, op });
    }
    let (lhs, rhs) = (k.device().location(), v.device().location());
    if lhs != rhs {
        return Err(Error::DeviceMismatchBinaryOp { lhs, rhs, op });
    }
    // The last dimension is a head's, whose size may differ, unless it is the sequence.
    let last = k.rank() - usize::from(dim + 1 < k.rank());
    if k.rank() != v.rank() || k.dims()[..last] != v.dims()[..last] {
        let (lhs, rhs) = (k.shape().clone(), v.shape().clone());
        return Err(Error::ShapeMismatchBinaryOp { lhs, rhs, op });
    }
    Ok(())
}

/// Appends, and puts the cache back as it was if that fails.
///
/// For Candle's caches, which append keys before values. Cloning one copies no tokens, and what a failed append wrote lies
/// behind the tokens that were there.
fn append_or_restore<C: Clone>(
    cache: &mut C,
    append: impl FnOnce(&mut C) -> candle_core::Result<(Tensor, Tensor)>,
) -> Result<(Tensor, Tensor)> {
    let before = cache.clone();
    let outcome = append(cache);
    if outcome.is_err() {
        *cache = before;
    }
    Ok(outcome?)
}
