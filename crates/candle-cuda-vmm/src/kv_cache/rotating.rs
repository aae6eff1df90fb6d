//! A KV cache of the last tokens, in place.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::checks::{check_pair, check_release, check_truncate};
use super::elastic::{ElasticKvCache, token_major};
use super::ring::{Ring, Run};
use super::traits::KvCache;
use crate::error::Result;
use crate::tensor_pool::TensorPool;
use candle_core::{Device, Tensor};

/// A KV cache of the last `max_seq_len` tokens, with the methods and the results of
/// `candle_nn::kv_cache::RotatingKvCache`, and memory for about that many tokens.
///
/// Use it for layers with a sliding window whose attention takes keys in any order, as all does
/// that gets the right mask: [`attn_mask`](Self::attn_mask). A new token overwrites the oldest in
/// place, so a decode step copies one token, and the addresses never move on.
///
/// As Candle's cache, it returns an append of at least `max_seq_len` tokens as it is, so that a
/// prompt sees all of itself. A shorter append of several tokens overwrites tokens that its first
/// queries would see. To keep those, use an [`ElasticKvCache`] and
/// [`release_front`](ElasticKvCache::release_front), with a window in the mask.
///
/// Returned tensors are snapshots, as those of [`ElasticKvCache`]. If one still lives when its
/// tokens are to be overwritten, all tokens are copied to new addresses first.
///
/// As a [`KvCache`] its length is the number of tokens that it holds, and its position that of the
/// next token. [`truncate`](KvCache::truncate) and [`release_front`](KvCache::release_front) copy
/// the tokens once if they are not in order.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_cuda_vmm::TensorPool;
///
/// # #[cfg(not(feature = "simulator"))]
/// # fn main() {}
/// # #[cfg(feature = "simulator")]
/// # fn main() -> candle_cuda_vmm::Result<()> {
/// let pool = TensorPool::new(&Device::Cpu)?;
/// let mut cache = pool.rotating_kv_cache(2, 4)?; // instead of `RotatingKvCache::new(2, 4)`
/// let tokens = Tensor::ones((1, 8, 3, 64), DType::F32, &Device::Cpu)?;
/// cache.append(&tokens, &tokens)?;
/// assert_eq!(cache.positions(2), [4, 1, 2, 3]);
/// let (k, _v) = cache.append(&tokens, &tokens)?;
/// assert_eq!(k.dims(), [1, 8, 4, 64]);
/// assert_eq!((cache.current_seq_len(), cache.offset()), (6, 2));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct ElasticRotatingKvCache {
    /// The rows of the ring.
    rows: ElasticKvCache,
    ring: Ring,
}

impl TensorPool {
    /// Makes an empty cache of the last `max_seq_len` tokens; see [`ElasticRotatingKvCache::new`].
    ///
    /// # Errors
    /// As [`ElasticRotatingKvCache::new`].
    pub fn rotating_kv_cache(
        &self,
        dim: usize,
        max_seq_len: usize,
    ) -> Result<ElasticRotatingKvCache> {
        ElasticRotatingKvCache::new(self, dim, max_seq_len)
    }
}

impl ElasticRotatingKvCache {
    /// Makes an empty cache of the last `max_seq_len` tokens, with the sequence in dimension `dim`.
    /// The first tokens set shape and dtype.
    ///
    /// # Errors
    /// [`Vmm`](crate::VmmError::Vmm) with `ZeroSize` if `max_seq_len` is 0.
    pub fn new(pool: &TensorPool, dim: usize, max_seq_len: usize) -> Result<Self> {
        if max_seq_len == 0 {
            let what = "max_seq_len";
            return Err(cuda_vmm::VmmError::ZeroSize { what }.into());
        }
        Ok(Self {
            rows: pool.kv_cache(dim, max_seq_len),
            ring: Ring::new(max_seq_len),
        })
    }

    /// Returns the dimension of the sequence.
    pub fn dim(&self) -> usize {
        self.rows.k_cache().dim()
    }

    /// Returns the most tokens that the cache holds.
    pub fn max_seq_len(&self) -> usize {
        self.ring.window()
    }

    /// Returns where the next token goes among those of the output.
    pub fn offset(&self) -> usize {
        self.ring.offset()
    }

    /// Returns the number of tokens that the cache has seen, as Candle's cache does: the
    /// [`position`](KvCache::position) of the next token.
    pub fn current_seq_len(&self) -> usize {
        self.ring.position()
    }

    /// Returns all keys in the cache; `None` if there are none.
    ///
    /// # Errors
    /// As [`ElasticTensor::view`](crate::ElasticTensor::view).
    pub fn k(&self) -> candle_core::Result<Option<Tensor>> {
        self.rows.k()
    }

    /// Returns all values in the cache; `None` if there are none.
    ///
    /// # Errors
    /// As [`ElasticTensor::view`](crate::ElasticTensor::view).
    pub fn v(&self) -> candle_core::Result<Option<Tensor>> {
        self.rows.v()
    }

    /// Returns the positions of the tokens that an [`append`](Self::append) of `seq_len` tokens
    /// will return.
    ///
    /// For exactly `max_seq_len` tokens this is the order of the ring from
    /// [`offset`](Self::offset) on, as in Candle's cache, though the append returns its input.
    pub fn positions(&self, seq_len: usize) -> Vec<usize> {
        self.ring.positions(seq_len)
    }

    /// Returns the mask for the scores of an [`append`](Self::append) of `seq_len` tokens over the
    /// tokens that it will return: `[seq_len, tokens]`, U8, with ones where a query must not see a
    /// key. `None` for one token, which sees all.
    ///
    /// As in Candle's cache, a query of several sees its own key and `max_seq_len` before it.
    ///
    /// # Errors
    /// Candle's, if the tensor cannot be made.
    pub fn attn_mask(
        &self,
        seq_len: usize,
        device: &Device,
    ) -> candle_core::Result<Option<Tensor>> {
        if seq_len == 1 {
            return Ok(None);
        }
        let (mask, tokens) = self.ring.mask(seq_len);
        Tensor::from_vec(mask, (seq_len, tokens), device).map(Some)
    }

    /// Appends the next tokens, and returns the keys and the values for their attention: those in
    /// the cache, or the new tokens alone if there are at least `max_seq_len`.
    ///
    /// # Errors
    /// As [`ElasticKvCache::append`]. After an error keys and values are unchanged.
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
        Ok(self.try_append(k, v)?)
    }

    /// As [`append`](Self::append), with this crate's errors.
    fn try_append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let dim = self.dim();
        check_pair(k, v, dim, "rotating-append")?;
        let count = k.dim(dim)?;
        let runs = self.ring.runs(count);
        let is_whole = count >= self.ring.window();
        let marks = self.rows.marks();
        let outcome = (|| {
            let mut grown = None;
            // Tokens that are not kept are checked too: they have the shape of those that are.
            if self.ring.len() == 0 || !runs.behind.tokens.is_empty() {
                let [k, v] = part(dim, [k, v], &runs.behind)?;
                grown = Some(self.rows.append(&k, &v)?);
            }
            let is_overwritten = runs.over.iter().any(|run| !run.tokens.is_empty());
            match grown {
                Some(output) if !is_overwritten && !is_whole => Ok(output),
                _ => {
                    drop(grown);
                    self.overwrite(&runs.over, [k, v], !is_whole)
                }
            }
        })();
        match outcome {
            Ok(output) => {
                self.ring.append(count);
                Ok(output)
            }
            Err(error) => {
                self.rows.undo(marks);
                Err(error)
            }
        }
    }

    /// Writes tokens over existing rows, and returns all rows if `with_output` is set, otherwise
    /// the tokens. After an error the rows are unchanged.
    fn overwrite(
        &mut self,
        runs: &[Run],
        tokens: [&Tensor; 2],
        with_output: bool,
    ) -> Result<(Tensor, Tensor)> {
        let dim = self.dim();
        let runs = || runs.iter().filter(|run| !run.tokens.is_empty());
        if let Some(rows) = self.rows.rows_mut()? {
            for (rows, tokens) in rows.into_iter().zip(tokens) {
                let order = token_major(dim, tokens)?;
                rows.check_like(&order)?;
                // Before the output is made, since that is a view.
                for Run { row, tokens } in runs() {
                    rows.make_writable(*row..*row + tokens.len())?;
                }
            }
        }
        let is_contiguous = self.rows.is_output_contiguous();
        let views = match with_output {
            true => Some(self.rows.views()?),
            false => None,
        };
        let mut saved = Vec::new();
        let written = runs().try_for_each(|run| {
            let both = part(dim, tokens, run)?;
            let Some([keys, values]) = self.rows.rows_mut()? else {
                return Ok(());
            };
            #[cfg(feature = "cuda")]
            if !is_contiguous && runs().count() == 1 {
                // One launch: it writes both or none.
                let pair = [(&mut *keys, &both[0]), (&mut *values, &both[1])];
                if crate::ElasticTensor::overwrite_both(pair, run.row, dim)? {
                    return Ok(());
                }
            }
            let count = run.tokens.len();
            saved.push((
                run.row,
                [
                    keys.copy_of(run.row, count)?,
                    values.copy_of(run.row, count)?,
                ],
            ));
            keys.overwrite(run.row, &token_major(dim, &both[0])?)?;
            values.overwrite(run.row, &token_major(dim, &both[1])?)
        });
        let outcome = written.and_then(|()| match views {
            None => Ok((tokens[0].clone(), tokens[1].clone())),
            Some((k, v)) if is_contiguous => Ok((k.force_contiguous()?, v.force_contiguous()?)),
            Some(views) => Ok(views),
        });
        if outcome.is_err()
            && let Ok(Some([keys, values])) = self.rows.rows_mut()
        {
            for (row, [k, v]) in saved {
                // The first error is the one to report.
                let _ = keys.overwrite(row, &k);
                let _ = values.overwrite(row, &v);
            }
        }
        outcome
    }

    /// Drops all tokens and frees their memory. Tensors that were returned before are unchanged.
    pub fn reset(&mut self) {
        self.rows.reset();
        self.ring = Ring::new(self.ring.window());
    }

    /// Makes a cache of the same pool with copies of the tokens, and the same position.
    ///
    /// # Errors
    /// As [`ElasticTensor::try_clone`](crate::ElasticTensor::try_clone).
    pub fn try_clone(&self) -> Result<Self> {
        Ok(Self {
            rows: self.rows.try_clone()?,
            ring: self.ring.clone(),
        })
    }

    /// Returns the bytes of device memory that are allocated for keys and values: whole pages.
    pub fn allocated_bytes(&self) -> usize {
        self.rows.allocated_bytes()
    }

    /// Writes `len` tokens, those after the first `released`, in order to the first rows.
    fn put_in_order(&mut self, released: usize, len: usize) -> Result<()> {
        let (dim, all, offset) = (self.dim(), self.ring.len(), self.ring.offset());
        let in_order = |rows: &Tensor| {
            let older = rows.narrow(dim, offset, all - offset)?;
            let newer = rows.narrow(dim, 0, offset)?;
            Tensor::cat(&[&older, &newer], dim)?.narrow(dim, released, len)
        };
        // The views end here, so that the rows need not move.
        let (k, v) = match (self.rows.k()?, self.rows.v()?) {
            (Some(k), Some(v)) => (in_order(&k)?, in_order(&v)?),
            _ => return Ok(()),
        };
        let run = Run {
            row: 0,
            tokens: 0..len,
        };
        self.overwrite(&[run], [&k, &v], false).map(drop)
    }
}

/// Copies the tokens. If that fails, the clone returns the error from each call until it is
/// [`reset`](Self::reset), as that of an [`ElasticKvCache`].
impl Clone for ElasticRotatingKvCache {
    fn clone(&self) -> Self {
        Self {
            rows: self.rows.clone(),
            ring: self.ring.clone(),
        }
    }
}

/// Returns tokens of a run.
fn part(dim: usize, tokens: [&Tensor; 2], run: &Run) -> candle_core::Result<[Tensor; 2]> {
    let part = |all: &Tensor| all.narrow(dim, run.tokens.start, run.tokens.len());
    Ok([part(tokens[0])?, part(tokens[1])?])
}

impl KvCache for ElasticRotatingKvCache {
    fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        self.try_append(k, v)
    }

    /// Returns the number of tokens in the cache, at most `max_seq_len`.
    fn current_seq_len(&self) -> usize {
        self.ring.len()
    }

    fn position(&self) -> usize {
        self.ring.position()
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        let all = self.ring.len();
        check_truncate(all, len)?;
        if len == all {
            return Ok(());
        }
        if !self.ring.is_in_order() {
            self.put_in_order(0, len)?;
        }
        self.rows.truncate(len)?;
        let position = self.ring.position() - (all - len);
        self.ring.set_in_order(len, position);
        Ok(())
    }

    fn release_front(&mut self, tokens: usize) -> Result<()> {
        let all = self.ring.len();
        check_release(all, tokens)?;
        if tokens == 0 {
            return Ok(());
        }
        let len = all - tokens;
        match self.ring.is_in_order() {
            true => self.rows.release_front(tokens)?,
            false => {
                self.put_in_order(tokens, len)?;
                self.rows.truncate(len)?;
            }
        }
        self.ring.set_in_order(len, self.ring.position());
        Ok(())
    }

    fn reset(&mut self) {
        self.reset();
    }
}
