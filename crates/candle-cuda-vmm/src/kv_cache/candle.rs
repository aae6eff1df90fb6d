//! Candle's caches behind the trait.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::checks::{check_pair, check_release, check_truncate};
use super::traits::KvCache;
use crate::error::Result;
use candle_core::Tensor;

/// A cache of Candle's that knows its position.
///
/// Candle's caches only grow. So [`truncate`](KvCache::truncate) and
/// [`release_front`](KvCache::release_front) copy the remaining tokens into new memory, and free
/// the old.
#[derive(Debug, Clone)]
pub struct CandleCache<C> {
    cache: C,
    released: usize,
}

impl<C> CandleCache<C> {
    pub(super) fn new(cache: C) -> Self {
        let released = 0;
        Self { cache, released }
    }

    /// Returns Candle's cache.
    pub fn inner(&self) -> &C {
        &self.cache
    }
}

/// What this crate needs of a cache of Candle's. A clone copies no tokens.
pub trait Growing: Clone {
    /// The operation's name in errors.
    const APPEND: &'static str;
    /// Returns the dimension of the sequence.
    fn sequence_dim(&self) -> usize;
    /// Returns the number of tokens.
    fn tokens(&self) -> usize;
    /// Returns all keys and values; `None` if there are none.
    fn contents(&self) -> candle_core::Result<Option<(Tensor, Tensor)>>;
    /// Appends keys before values. After an error only tokens behind the existing ones may differ.
    fn grow(&mut self, k: &Tensor, v: &Tensor) -> candle_core::Result<(Tensor, Tensor)>;
    /// Drops all tokens.
    fn clear(&mut self);
}

impl<C: Growing> CandleCache<C> {
    /// Keeps `len` tokens from `start` on. After an error the cache is unchanged.
    fn keep(&mut self, start: usize, len: usize) -> Result<()> {
        if len == self.cache.tokens() {
            return Ok(());
        }
        let mut kept = self.cache.clone();
        kept.clear();
        if let Some((k, v)) = self.cache.contents()?.filter(|_| len > 0) {
            let dim = self.cache.sequence_dim();
            // A contiguous part would be a view, which keeps all of the memory.
            let part = |all: &Tensor| all.narrow(dim, start, len)?.force_contiguous();
            kept.grow(&part(&k)?, &part(&v)?)?;
        }
        self.cache = kept;
        Ok(())
    }
}

impl<C: Growing> KvCache for CandleCache<C> {
    fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        check_pair(k, v, self.cache.sequence_dim(), C::APPEND)?;
        let before = self.cache.clone();
        let outcome = self.cache.grow(k, v);
        if outcome.is_err() {
            self.cache = before;
        }
        Ok(outcome?)
    }

    fn current_seq_len(&self) -> usize {
        self.cache.tokens()
    }

    fn position(&self) -> usize {
        self.released + self.cache.tokens()
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        check_truncate(self.cache.tokens(), len)?;
        self.keep(0, len)
    }

    fn release_front(&mut self, tokens: usize) -> Result<()> {
        let len = self.cache.tokens();
        check_release(len, tokens)?;
        self.keep(tokens, len - tokens)?;
        self.released += tokens;
        Ok(())
    }

    fn reset(&mut self) {
        self.cache.clear();
        self.released = 0;
    }
}
