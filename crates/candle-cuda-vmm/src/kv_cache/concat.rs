//! Candle's concatenating cache.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::candle::{CandleCache, Growing};
use super::traits::KvCacheFactory;
use crate::error::Result;
use candle_core::Tensor;
use candle_nn::kv_cache::ConcatKvCache;

/// Makes [`candle_nn::kv_cache::ConcatKvCache`]s.
///
/// Such a cache has memory for exactly its tokens, and copies all of them at every append. It
/// ignores `max_seq_len`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConcatCaches;

impl KvCacheFactory for ConcatCaches {
    type Cache = CandleCache<ConcatKvCache>;

    fn layer(&self, _layer: usize, dim: usize, _max_seq_len: usize) -> Result<Self::Cache> {
        Ok(CandleCache::new(ConcatKvCache::new(dim)))
    }
}

impl Growing for ConcatKvCache {
    const APPEND: &'static str = "concat-append";

    fn sequence_dim(&self) -> usize {
        self.dim()
    }

    fn tokens(&self) -> usize {
        self.current_seq_len()
    }

    fn contents(&self) -> candle_core::Result<Option<(Tensor, Tensor)>> {
        Ok(self.k().cloned().zip(self.v().cloned()))
    }

    fn grow(&mut self, k: &Tensor, v: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
        self.append(k, v)
    }

    fn clear(&mut self) {
        self.reset();
    }
}
