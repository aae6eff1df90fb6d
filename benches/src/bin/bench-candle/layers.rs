//! The caches of all layers, to which tokens are appended.

use crate::machine::Machine;
use candle_core::{DType, Result, Tensor};
use candle_cuda_vmm::{ElasticKvCache, TensorPool};
use candle_nn::kv_cache::KvCache;
use std::hint::black_box;

/// Heads of keys, and of values.
pub const KV_HEADS: usize = 8;
/// Elements of a head.
pub const HEAD_DIM: usize = 128;
/// The type of keys and values.
pub const DTYPE: DType = DType::F16;

/// Appends, and returns views of all keys and values.
type Append<C> = fn(&mut C, &Tensor, &Tensor) -> Result<(Tensor, Tensor)>;

/// A cache for each layer.
pub struct Layers<C> {
    caches: Vec<C>,
    append: Append<C>,
}

impl Layers<ElasticKvCache> {
    /// Those that grow.
    pub fn elastic(machine: &Machine, pool: &TensorPool, tokens: usize) -> Self {
        let caches = (0..machine.sizes.layers).map(|_| pool.kv_cache(2, tokens));
        Self {
            caches: caches.collect(),
            append: ElasticKvCache::append,
        }
    }
}

impl Layers<KvCache> {
    /// Candle's, with memory for this many tokens from the beginning.
    pub fn preallocated(machine: &Machine, tokens: usize) -> Self {
        let caches = (0..machine.sizes.layers).map(|_| KvCache::new(2, tokens));
        Self {
            caches: caches.collect(),
            append: KvCache::append,
        }
    }
}

impl<C> Layers<C> {
    /// Appends the same tokens in each layer, as keys and as values, and drops the views.
    pub fn append(&mut self, tokens: &Tensor) -> Result<()> {
        for cache in &mut self.caches {
            black_box((self.append)(cache, tokens, tokens)?);
        }
        Ok(())
    }
}

/// Tokens for one layer.
pub fn tokens(machine: &Machine, count: usize) -> Result<Tensor> {
    let shape = (1, KV_HEADS, count, HEAD_DIM);
    Tensor::zeros(shape, DTYPE, &machine.candle)
}

/// Bytes of a token's keys and values in all layers.
pub fn token_bytes(layers: usize) -> usize {
    2 * layers * KV_HEADS * HEAD_DIM * DTYPE.size_in_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_of_the_table_takes_128_kib() {
        assert_eq!(token_bytes(32), 128 << 10);
        assert_eq!(token_bytes(32) * 131_072, 16 << 30);
    }
}
