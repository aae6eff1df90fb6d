//! Candle's preallocated cache.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::checks::{append_or_restore, check_pair, check_truncate};
use super::traits::{KvCache, KvCacheFactory};
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
    type Cache = kv_cache::KvCache;

    /// # Errors
    /// [`Vmm`](crate::VmmError::Vmm) with `ZeroSize` if `max_seq_len` is 0. Such a cache could
    /// never grow.
    fn layer(&self, _layer: usize, dim: usize, max_seq_len: usize) -> Result<Self::Cache> {
        if max_seq_len == 0 {
            let what = "max_seq_len";
            return Err(cuda_vmm::VmmError::ZeroSize { what }.into());
        }
        Ok(kv_cache::KvCache::new(dim, max_seq_len))
    }
}

/// `truncate` copies the remaining tokens into new memory, because this cache cannot be shortened.
impl KvCache for kv_cache::KvCache {
    fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        check_pair(k, v, self.k_cache().dim(), "kv-append")?;
        let (k, v) = (k.contiguous()?, v.contiguous()?);
        append_or_restore(self, |cache| cache.append(&k, &v))
    }

    fn current_seq_len(&self) -> usize {
        self.current_seq_len()
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        check_truncate(self.current_seq_len(), len)?;
        if len == self.current_seq_len() {
            return Ok(());
        }
        let kept = match (self.k()?, self.v()?) {
            (Some(k), Some(v)) if len > 0 => {
                let (k_dim, v_dim) = (self.k_cache().dim(), self.v_cache().dim());
                let (k, v) = (k.narrow(k_dim, 0, len)?, v.narrow(v_dim, 0, len)?);
                Some((k.contiguous()?, v.contiguous()?))
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
