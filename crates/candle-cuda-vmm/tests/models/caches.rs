//! Factories for models with sliding windows.

use candle::Tensor;
use candle_cuda_vmm::kv_cache::{KvCache, KvCacheFactory};
use candle_cuda_vmm::{ElasticKvCache, ElasticRotatingKvCache, Result, TensorPool};

/// Which layers have a window, and its length.
pub type Windows = fn(usize) -> Option<usize>;

/// Makes caches of any kind that keep a window, by `release_front`.
pub struct Windowed<'a, F>(pub &'a F, pub Windows);

pub struct WindowedCache<C> {
    cache: C,
    window: Option<usize>,
}

impl<F: KvCacheFactory> KvCacheFactory for Windowed<'_, F> {
    type Cache = WindowedCache<F::Cache>;

    fn layer(&self, layer: usize, dim: usize, max_seq_len: usize) -> Result<Self::Cache> {
        let window = self.1(layer);
        let cache = self.0.layer(layer, dim, max_seq_len)?;
        Ok(WindowedCache { cache, window })
    }
}

impl<C: KvCache> KvCache for WindowedCache<C> {
    fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        if let Some(window) = self.window {
            // As in the stock model: one token sees a window with itself in it, and each of several
            // sees a window before it.
            let kept = window - usize::from(k.dims()[2] == 1);
            let released = self.cache.current_seq_len().saturating_sub(kept);
            self.cache.release_front(released)?;
        }
        self.cache.append(k, v)
    }

    fn current_seq_len(&self) -> usize {
        self.cache.current_seq_len()
    }

    fn position(&self) -> usize {
        self.cache.position()
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        self.cache.truncate(len)
    }

    fn release_front(&mut self, tokens: usize) -> Result<()> {
        self.cache.release_front(tokens)
    }

    fn reset(&mut self) {
        self.cache.reset();
    }
}

/// Makes rotating caches for layers with a window, and elastic ones for the others.
pub struct Rotating<'a>(pub &'a TensorPool, pub Windows);

pub enum RotatingCache {
    Last(ElasticRotatingKvCache),
    All(ElasticKvCache),
}

impl RotatingCache {
    fn get(&self) -> &dyn KvCache {
        match self {
            Self::Last(cache) => cache,
            Self::All(cache) => cache,
        }
    }

    fn get_mut(&mut self) -> &mut dyn KvCache {
        match self {
            Self::Last(cache) => cache,
            Self::All(cache) => cache,
        }
    }
}

impl KvCacheFactory for Rotating<'_> {
    type Cache = RotatingCache;

    fn layer(&self, layer: usize, dim: usize, max_seq_len: usize) -> Result<Self::Cache> {
        Ok(match self.1(layer) {
            Some(window) => RotatingCache::Last(self.0.rotating_kv_cache(dim, window)?),
            None => RotatingCache::All(self.0.kv_cache(dim, max_seq_len)),
        })
    }
}

impl KvCache for RotatingCache {
    fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        self.get_mut().append(k, v)
    }

    fn current_seq_len(&self) -> usize {
        self.get().current_seq_len()
    }

    fn position(&self) -> usize {
        self.get().position()
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        self.get_mut().truncate(len)
    }

    fn release_front(&mut self, tokens: usize) -> Result<()> {
        self.get_mut().release_front(tokens)
    }

    fn reset(&mut self) {
        self.get_mut().reset();
    }
}
