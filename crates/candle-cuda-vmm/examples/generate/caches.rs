//! The kinds of caches to choose from, and what each takes of memory.

use candle_core::Tensor;
use candle_cuda_vmm::kv_cache::{ConcatCaches, KvCacheFactory, PreallocatedCaches};
use candle_cuda_vmm::{ElasticKvCache, TensorPool};
use candle_nn::kv_cache::{ConcatKvCache, KvCache};

/// Which cache: each a factory for which `main` has an arm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// Candle's `KvCache`, with memory for the longest sequence from the start
    Kv,
    /// Candle's `ConcatKvCache`, which copies itself at every token
    Concat,
    /// `ElasticKvCache`, with memory for the tokens that are there
    Elastic,
}

/// A factory that knows what its caches take.
pub trait Measured: KvCacheFactory {
    /// Bytes of memory behind the caches of all layers, what is not used yet among them.
    fn held_bytes<'a>(&self, caches: impl Iterator<Item = &'a Self::Cache>) -> usize
    where
        Self::Cache: 'a;
}

impl Measured for PreallocatedCaches {
    fn held_bytes<'a>(&self, caches: impl Iterator<Item = &'a KvCache>) -> usize {
        caches
            .flat_map(|cache| [cache.k_cache(), cache.v_cache()])
            .filter_map(|cache| cache.all_data().as_ref())
            .map(bytes)
            .sum()
    }
}

impl Measured for ConcatCaches {
    fn held_bytes<'a>(&self, caches: impl Iterator<Item = &'a ConcatKvCache>) -> usize {
        caches
            .flat_map(|cache| [cache.k(), cache.v()])
            .flatten()
            .map(bytes)
            .sum()
    }
}

impl Measured for TensorPool {
    /// All that the pool holds: the caches are all that it is for.
    fn held_bytes<'a>(&self, _caches: impl Iterator<Item = &'a ElasticKvCache>) -> usize {
        self.committed_bytes()
    }
}

fn bytes(tensor: &Tensor) -> usize {
    tensor.elem_count() * tensor.dtype().size_in_bytes()
}
