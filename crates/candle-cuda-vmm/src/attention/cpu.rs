//! Attention on the CPU: loops over K and V in place, with sums in F32.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::element::{Element, capped, dot};
use super::options::GqaOptions;
use super::sizes::{NAME, Sizes};
use candle_core::{CpuStorage, Error, Layout, Result};
use half::{bf16, f16};

/// Computes the attention of q, K and V. q is contiguous.
pub fn attend(
    sizes: &Sizes,
    options: &GqaOptions,
    [q, k, v]: [(&CpuStorage, &Layout); 3],
) -> Result<CpuStorage> {
    match q.0 {
        CpuStorage::F32(_) => attend_typed::<f32>(sizes, options, [q, k, v]),
        CpuStorage::F16(_) => attend_typed::<f16>(sizes, options, [q, k, v]),
        CpuStorage::BF16(_) => attend_typed::<bf16>(sizes, options, [q, k, v]),
        other => {
            use candle_core::backend::BackendStorage;
            Err(Error::UnsupportedDTypeForOp(other.dtype(), NAME))
        }
    }
}

fn attend_typed<T: Element>(
    sizes: &Sizes,
    options: &GqaOptions,
    [q, k, v]: [(&CpuStorage, &Layout); 3],
) -> Result<CpuStorage> {
    let per_head = sizes.rows() * sizes.dim;
    let queries = &T::cpu_storage_as_slice(q.0)?[q.1.start_offset()..];
    let (k, v) = (Heads::<T>::new(k)?, Heads::<T>::new(v)?);
    let mut result = Vec::with_capacity(sizes.shape().elem_count());
    let mut scores = vec![0.; sizes.rows() * sizes.keys];
    for batch in 0..sizes.batch {
        for head in 0..sizes.kv_heads {
            let first = (batch * sizes.kv_heads + head) * per_head;
            let queries: Vec<f32> = queries[first..first + per_head]
                .iter()
                .map(|element| element.widen())
                .collect();
            let keys = |key| k.row(batch, head, key, sizes.dim);
            attention_weights(sizes, options, &queries, keys, &mut scores);
            let values = |key| v.row(batch, head, key, sizes.value_dim);
            let mixed = weighted_sums(sizes, options, &scores, values);
            result.extend(mixed.into_iter().map(T::narrow));
        }
    }
    Ok(T::to_cpu_storage_owned(result))
}

/// The heads of K or V, in memory of any strides whose last is 1.
struct Heads<'a, T> {
    elements: &'a [T],
    start: usize,
    strides: [usize; 3],
}

impl<'a, T: Element> Heads<'a, T> {
    fn new((storage, layout): (&'a CpuStorage, &Layout)) -> Result<Self> {
        let strides = layout.stride();
        Ok(Self {
            elements: T::cpu_storage_as_slice(storage)?,
            start: layout.start_offset(),
            strides: [strides[0], strides[1], strides[2]],
        })
    }

    fn row(&self, batch: usize, head: usize, key: usize, dim: usize) -> &'a [T] {
        let [batch_stride, head_stride, key_stride] = self.strides;
        let first = self.start + batch * batch_stride + head * head_stride + key * key_stride;
        &self.elements[first..first + dim]
    }
}

/// Returns whether the query of this row sees this key.
fn sees(sizes: &Sizes, options: &GqaOptions, row: usize, key: usize) -> bool {
    sizes.seen(options.mask, row % sizes.queries).contains(&key)
}

/// Computes the weight of each key for each query row, `[rows, keys]`: a softmax over the keys that
/// the query sees, and 0 for the others.
fn attention_weights<'a, T: Element>(
    sizes: &Sizes,
    options: &GqaOptions,
    queries: &[f32],
    keys: impl Fn(usize) -> &'a [T],
    scores: &mut [f32],
) {
    // The outer loop is over keys, so that each is read once for all rows.
    let mut wide = vec![0.; sizes.dim];
    for key in 0..sizes.keys {
        T::widen_all(keys(key), &mut wide);
        for (row, query) in queries.chunks_exact(sizes.dim).enumerate() {
            scores[row * sizes.keys + key] = match sees(sizes, options, row, key) {
                true => capped(dot(query, &wide) * options.scale, options.soft_cap),
                false => f32::NEG_INFINITY,
            };
        }
    }
    for row in scores.chunks_exact_mut(sizes.keys) {
        let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.;
        for score in &mut *row {
            *score = (*score - largest).exp();
            sum += *score;
        }
        row.iter_mut().for_each(|score| *score /= sum);
    }
}

/// Computes the weighted sums of values, `[rows, value_dim]`.
fn weighted_sums<'a, T: Element>(
    sizes: &Sizes,
    options: &GqaOptions,
    weights: &[f32],
    values: impl Fn(usize) -> &'a [T],
) -> Vec<f32> {
    let mut result = vec![0.; sizes.rows() * sizes.value_dim];
    let mut wide = vec![0.; sizes.value_dim];
    for key in 0..sizes.keys {
        T::widen_all(values(key), &mut wide);
        for (row, result) in result.chunks_exact_mut(sizes.value_dim).enumerate() {
            // A prompt's queries do not see about half of the keys.
            if sees(sizes, options, row, key) {
                let weight = weights[row * sizes.keys + key];
                for (sum, value) in result.iter_mut().zip(&wide) {
                    *sum += weight * value;
                }
            }
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::super::options::Mask;
    use super::*;

    #[test]
    fn a_key_that_is_not_seen_has_no_weight() {
        let sizes = Sizes {
            batch: 1,
            kv_heads: 1,
            group: 1,
            queries: 2,
            keys: 2,
            dim: 1,
            value_dim: 1,
        };
        let memory = [1., 1000.];
        let keys = |key: usize| &memory[key..=key];
        let mut weights = [0.; 4];
        let options = GqaOptions::new(1.).mask(Mask::Causal);
        attention_weights(&sizes, &options, &[1., 1.], keys, &mut weights);
        assert_eq!(weights, [1., 0., 0., 1.]);
        assert_eq!(weighted_sums(&sizes, &options, &weights, keys), memory);
    }
}
