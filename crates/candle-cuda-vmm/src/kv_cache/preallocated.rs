//! Candle's preallocated cache.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::candle::{CandleCache, Growing};
use super::traits::KvCacheFactory;
use crate::error::Result;
use candle_core::Tensor;
use candle_nn::kv_cache;

/// Makes [`candle_nn::kv_cache::KvCache`]s.
///
/// Such a cache allocates memory for `max_seq_len` tokens at the first append. Each time it is
/// full, it copies all tokens into memory for `max_seq_len` more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PreallocatedCaches;

impl KvCacheFactory for PreallocatedCaches {
    type Cache = CandleCache<kv_cache::KvCache>;

    /// # Errors
    /// [`Vmm`](crate::VmmError::Vmm) with `ZeroSize` if `max_seq_len` is 0. Such a cache could
    /// never grow.
    fn layer(&self, _layer: usize, dim: usize, max_seq_len: usize) -> Result<Self::Cache> {
        if max_seq_len == 0 {
            let what = "max_seq_len";
            return Err(cuda_vmm::VmmError::ZeroSize { what }.into());
        }
        Ok(CandleCache::new(kv_cache::KvCache::new(dim, max_seq_len)))
    }
}

impl Growing for kv_cache::KvCache {
    const APPEND: &'static str = "kv-append";

    fn sequence_dim(&self) -> usize {
        self.k_cache().dim()
    }

    fn tokens(&self) -> usize {
        self.current_seq_len()
    }

    fn contents(&self) -> candle_core::Result<Option<(Tensor, Tensor)>> {
        Ok(self.k()?.zip(self.v()?))
    }

    fn grow(&mut self, k: &Tensor, v: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
        self.append(&k.contiguous()?, &v.contiguous()?)
    }

    fn clear(&mut self) {
        self.reset();
    }
}
