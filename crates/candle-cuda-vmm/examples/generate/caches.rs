//! The kinds of caches, and how much memory each holds.

use crate::generation::Generator;
use crate::model::Decoder;
use candle_core::{Result, Tensor};
use candle_cuda_vmm::kv_cache::{CandleCache, ConcatCaches, KvCacheFactory, PreallocatedCaches};
use candle_cuda_vmm::{ElasticKvCache, TensorPool};
use candle_nn::kv_cache::{ConcatKvCache, KvCache};

/// The kind of cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// Candle's `KvCache`, with memory for the longest sequence from the start
    Kv,
    /// Candle's `ConcatKvCache`, which copies all tokens at every append
    Concat,
    /// `ElasticKvCache`, with memory for the tokens in it only
    Elastic,
    /// `ElasticBlocks` with a block table, for `attention::prompt` and `decode` in place of
    /// `--attention`. A GPU needs the feature `attention`
    Paged,
}

/// A factory that reports how much memory its caches hold.
pub trait Measured: KvCacheFactory {
    /// Returns the memory in bytes that the caches of all layers hold, including unused memory.
    fn held_bytes<'a>(&self, caches: impl Iterator<Item = &'a Self::Cache>) -> usize
    where
        Self::Cache: 'a;
}

/// A decoder, and the factory of its caches.
pub struct Cached<'a, F: Measured> {
    pub decoder: Decoder<F::Cache>,
    pub factory: &'a F,
}

impl<F: Measured> Generator for Cached<'_, F> {
    fn forward(&mut self, tokens: &[u32]) -> Result<Tensor> {
        self.decoder.forward(tokens)
    }

    fn tokens(&self) -> usize {
        self.decoder.tokens()
    }

    fn held_bytes(&self) -> usize {
        self.factory.held_bytes(self.decoder.caches())
    }
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
