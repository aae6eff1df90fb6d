//! Candle's concatenating cache.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::checks::{append_or_restore, check_pair, check_truncate};
use super::traits::{KvCache, KvCacheFactory};
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
    type Cache = ConcatKvCache;

    fn layer(&self, _layer: usize, dim: usize, _max_seq_len: usize) -> Result<Self::Cache> {
        Ok(ConcatKvCache::new(dim))
    }
}

/// `truncate` copies the remaining tokens, so that the memory of the others is freed.
impl KvCache for ConcatKvCache {
    fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        check_pair(k, v, self.dim(), "concat-append")?;
        append_or_restore(self, |cache| cache.append(k, v))
    }

    fn current_seq_len(&self) -> usize {
        self.current_seq_len()
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        check_truncate(self.current_seq_len(), len)?;
        if len == self.current_seq_len() {
            return Ok(());
        }
        let dim = self.dim();
        let kept = match (self.k(), self.v()) {
            (Some(k), Some(v)) if len > 0 => {
                // A contiguous part would be a view, which keeps all of the memory.
                let first = |all: &Tensor| all.narrow(dim, 0, len)?.force_contiguous();
                Some((first(k)?, first(v)?))
            }
            _ => None,
        };
        self.reset();
        if let Some((k, v)) = kept {
            self.append(&k, &v)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.reset();
    }
}
