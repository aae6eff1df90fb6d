//! The kinds of caches, and how much memory each holds.

use candle_core::Tensor;
use candle_cuda_vmm::kv_cache::{CandleCache, ConcatCaches, KvCacheFactory, PreallocatedCaches};
use candle_cuda_vmm::{ElasticKvCache, TensorPool};
use candle_nn::kv_cache::{ConcatKvCache, KvCache};

/// The kind of cache. `main` maps each to a factory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// Candle's `KvCache`, with memory for the longest sequence from the start
    Kv,
    /// Candle's `ConcatKvCache`, which copies all tokens at every append
    Concat,
    /// `ElasticKvCache`, with memory for the tokens in it only
    Elastic,
}

/// A factory that reports how much memory its caches hold.
pub trait Measured: KvCacheFactory {
    /// Returns the memory in bytes that the caches of all layers hold, including unused memory.
    fn held_bytes<'a>(&self, caches: impl Iterator<Item = &'a Self::Cache>) -> usize
    where
        Self::Cache: 'a;
}

impl Measured for PreallocatedCaches {
    fn held_bytes<'a>(&self, caches: impl Iterator<Item = &'a CandleCache<KvCache>>) -> usize {
        caches
            .map(CandleCache::inner)
            .flat_map(|cache| [cache.k_cache(), cache.v_cache()])
            .filter_map(|cache| cache.all_data().as_ref())
            .map(bytes)
            .sum()
    }
}

impl Measured for ConcatCaches {
    fn held_bytes<'a>(
        &self,
        caches: impl Iterator<Item = &'a CandleCache<ConcatKvCache>>,
    ) -> usize {
        caches
            .map(CandleCache::inner)
            .flat_map(|cache| [cache.k(), cache.v()])
            .flatten()
            .map(bytes)
            .sum()
    }
}

impl Measured for TensorPool {
    /// Returns all that the pool holds, since the pool has no other tensors.
    fn held_bytes<'a>(&self, _caches: impl Iterator<Item = &'a ElasticKvCache>) -> usize {
        self.committed_bytes()
    }
}

fn bytes(tensor: &Tensor) -> usize {
    tensor.elem_count() * tensor.dtype().size_in_bytes()
}
