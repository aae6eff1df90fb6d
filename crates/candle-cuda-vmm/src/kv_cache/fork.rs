//! Caches that begin with the tokens of others, in the same memory.

use super::elastic::ElasticKvCache;
use super::sequence::{Sequence, SequenceCache, SequenceRows};
use crate::elastic_tensor::ElasticTensor;
use crate::error::Result;
use std::sync::{Arc, Mutex};

impl ElasticKvCache {
    /// Makes a cache of the same pool with the same tokens, in the same memory as far as that goes;
    /// see [`ElasticTensor::fork`]. Keys and values are forked both, or neither.
    ///
    /// # Errors
    /// As [`ElasticTensor::fork`].
    pub fn fork(&self) -> Result<Self> {
        self.check()?;
        let tensors: Vec<_> = self.all_rows().collect();
        let (forks, _) = ElasticTensor::fork_together(&tensors, None)?;
        Ok(self.with_rows(&mut forks.into_iter()))
    }
}

impl Sequence {
    /// Makes a sequence with the same tokens in all layers, in the same memory as far as that goes,
    /// or after an error none.
    ///
    /// Use it for requests that begin alike, and for several answers to one: the memory of the
    /// tokens so far is held once, and each sequence goes on by itself. See
    /// [`ElasticTensor::fork`] for what is shared and what a sequence does that drops tokens of the
    /// common part.
    ///
    /// A model takes the caches of the fork as it took those of this one ([`layer`] returns them).
    ///
    /// [`layer`]: super::KvCacheFactory::layer
    ///
    /// # Errors
    /// As [`ElasticTensor::fork`].
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_cuda_vmm::TensorPool;
    /// use candle_cuda_vmm::kv_cache::{KvCache, KvCacheFactory};
    ///
    /// # #[cfg(not(feature = "simulator"))]
    /// # fn main() {}
    /// # #[cfg(feature = "simulator")]
    /// # fn main() -> candle_cuda_vmm::Result<()> {
    /// let pool = TensorPool::new(&Device::Cpu)?;
    /// let prompt = pool.sequence();
    /// let tokens = Tensor::zeros((1, 8, 4096, 64), DType::F32, &Device::Cpu)?;
    /// prompt.layer(0, 2, 8192)?.append(&tokens, &tokens)?; // 8 MiB of keys, 8 MiB of values
    /// let answers = [prompt.fork()?, prompt.fork()?, prompt.fork()?];
    /// let token = tokens.narrow(2, 0, 1)?;
    /// for answer in &answers {
    ///     answer.layer(0, 2, 8192)?.append(&token, &token)?;
    ///     assert_eq!(answer.len(), 4097);
    /// }
    /// // Each answer adds a page of keys and one of values.
    /// assert_eq!(pool.account().stats().parts.shared_bytes, 16 << 20);
    /// assert_eq!(pool.account().stats().parts.live_page_bytes, 3 * 2 * (2 << 20));
    /// # Ok(())
    /// # }
    /// ```
    pub fn fork(&self) -> Result<Self> {
        self.with_layers(|caches| {
            for (_, cache) in caches.iter() {
                cache.check()?;
            }
            let tensors: Vec<_> = (caches.iter())
                .flat_map(|(_, cache)| cache.all_rows())
                .collect();
            let whole = self.rows.as_ref().and_then(SequenceRows::shared);
            let (forks, whole) = ElasticTensor::fork_together(&tensors, whole)?;
            let mut forks = forks.into_iter();
            let layers = caches.iter().map(|(layer, cache)| {
                let cache = cache.with_rows(&mut forks);
                let cache = SequenceCache {
                    pool: self.pool.clone(),
                    cache: Arc::new(Mutex::new(cache)),
                };
                (*layer, cache)
            });
            Ok(Self {
                pool: self.pool.clone(),
                layers: Arc::new(Mutex::new(layers.collect())),
                rows: (self.rows.as_ref()).map(|rows| rows.with_shared(whole)),
            })
        })
    }
}
