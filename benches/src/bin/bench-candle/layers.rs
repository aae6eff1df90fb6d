//! The caches of all layers, to which tokens are appended.

use crate::machine::Machine;
use candle_core::{DType, Result, Tensor};
use candle_cuda_vmm::kv_cache::{KvCache, KvCacheFactory};
use std::hint::black_box;

/// Of keys and values.
pub const KV_HEADS: usize = 8;
pub const HEAD_DIM: usize = 128;
pub const DTYPE: DType = DType::F16;
pub const LAYERS: [usize; 2] = [32, 2];

pub struct Layers<F: KvCacheFactory>(Vec<F::Cache>);

impl<F: KvCacheFactory> Layers<F> {
    /// Caches that expect this many tokens.
    pub fn new(machine: &Machine, factory: &F, tokens: usize) -> Result<Self> {
        let caches = (0..machine.sized(LAYERS)).map(|layer| factory.layer(layer, 2, tokens));
        Ok(Self(caches.collect::<candle_cuda_vmm::Result<_>>()?))
    }

    /// Appends the same tokens in each layer, as keys and as values, and drops the views.
    pub fn append(&mut self, tokens: &Tensor) -> Result<()> {
        for cache in &mut self.0 {
            black_box(cache.append(tokens, tokens)?);
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
