//! Attention of decode steps on the CPU: an online softmax over tiles of keys, with sums in F32.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::cpu_rows::{RowIndex, Rows, cpu};
use super::element::{Element, capped, dot};
use super::kv_batch::KvBatch;
use super::kv_check::HostTables;
use super::kv_memory::Side;
use super::options::{GqaOptions, Mask};
use candle_core::op::BackpropOp;
use candle_core::{DType, Error, Result, Storage, Tensor};
use float8::F8E4M3;
use half::{bf16, f16};
use rayon::prelude::*;
use std::ops::Range;

/// Keys whose scores are kept at once.
const TILE: usize = 32;

/// Computes the attention of one query for each sequence. q is contiguous, `[batch, query_heads,
/// dim]`. Lengths and tables are checked.
pub fn decode(
    q: &Tensor,
    kv: &KvBatch,
    options: &GqaOptions,
    lengths: &[usize],
    tables: &HostTables,
) -> Result<Tensor> {
    let step = Step {
        kv,
        options,
        lengths,
        tables,
    };
    match (q.dtype(), kv.dtype()) {
        (DType::F32, DType::F32) => step.run::<f32, f32>(q),
        (DType::F16, DType::F16) => step.run::<f16, f16>(q),
        (DType::BF16, DType::BF16) => step.run::<bf16, bf16>(q),
        (DType::F16, DType::F8E4M3) => step.run::<f16, F8E4M3>(q),
        (DType::BF16, DType::F8E4M3) => step.run::<bf16, F8E4M3>(q),
        (other, _) => Err(Error::UnsupportedDTypeForOp(other, "decode")),
    }
}

/// A decode step of all sequences.
struct Step<'a> {
    kv: &'a KvBatch,
    options: &'a GqaOptions,
    lengths: &'a [usize],
    tables: &'a HostTables,
}

impl Step<'_> {
    fn run<Q: Element, T: Element>(&self, q: &Tensor) -> Result<Tensor> {
        let kv = self.kv;
        let (batch, query_heads, dim) = q.dims3()?;
        let group = query_heads / kv.kv_heads();
        let (queries, layout) = q.storage_and_layout();
        let queries = &Q::cpu_storage_as_slice(cpu(&queries)?)?[layout.start_offset()..];
        let [k, v] = [Side::K, Side::V].map(|side| kv.memory.tensors(side));
        let [k, v] = [&k, &v].map(|tensors| {
            let tensors = tensors.iter().map(|tensor| tensor.storage_and_layout());
            tensors.collect::<Vec<_>>()
        });
        let [k_index, v_index] =
            [Side::K, Side::V].map(|side| RowIndex::new(kv, side, self.tables));
        let keys = Rows::<T>::new(
            k_index,
            k.iter().map(|(storage, layout)| (&**storage, *layout)),
        )?;
        let values = Rows::<T>::new(
            v_index,
            v.iter().map(|(storage, layout)| (&**storage, *layout)),
        )?;

        // Each task writes the results of the query heads that share a head of K and V.
        let mut results = vec![Q::narrow(0.); batch * query_heads * kv.value_dim()];
        let tasks = results.par_chunks_mut(group * kv.value_dim()).enumerate();
        tasks.for_each(|(task, results)| {
            let (sequence, head) = (task / kv.kv_heads(), task % kv.kv_heads());
            if self.lengths[sequence] == 0 {
                return;
            }
            let mut wide = vec![0.; group * dim];
            Q::widen_all(&queries[task * group * dim..][..group * dim], &mut wide);
            let mut sums = Sums::new(self, &wide, group);
            for tile in tiles(self.seen(sequence)) {
                let rows = tile.clone().map(|token| keys.row(sequence, head, token));
                sums.score(rows);
                let rows = tile.map(|token| values.row(sequence, head, token));
                sums.add(rows);
            }
            let numbers = sums.finish();
            for (result, number) in results.iter_mut().zip(numbers) {
                *result = Q::narrow(number);
            }
        });
        let storage = Storage::Cpu(Q::to_cpu_storage_owned(results));
        let shape = (batch, query_heads, kv.value_dim());
        Ok(Tensor::from_storage(
            storage,
            shape,
            BackpropOp::none(),
            false,
        ))
    }

    /// Returns the tokens that the query of a sequence sees.
    fn seen(&self, sequence: usize) -> Range<usize> {
        let length = self.lengths[sequence];
        match self.options.mask {
            Mask::Window(window) => length.saturating_sub(window)..length,
            _ => 0..length,
        }
    }
}

/// Splits a range into tiles.
fn tiles(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range
        .step_by(TILE)
        .map(move |first| first..end.min(first + TILE))
}

/// The weighted sums of values of some queries, over the tiles so far.
struct Sums<'a> {
    /// `[queries, dim]`
    queries: &'a [f32],
    dim: usize,
    value_dim: usize,
    scale: f32,
    value_scale: f32,
    soft_cap: Option<f32>,
    /// The largest score of each query so far; all weights are relative to it.
    largest: Vec<f32>,
    /// The sum of the weights of each query.
    weights: Vec<f32>,
    /// `[queries, value_dim]`: sums of values times weights.
    values: Vec<f32>,
    /// `[queries, TILE]`: scores of the tile, then weights.
    tile: Vec<f32>,
    /// One row of K or V.
    row: Vec<f32>,
}

impl<'a> Sums<'a> {
    fn new(step: &Step, queries: &'a [f32], count: usize) -> Self {
        let (dim, value_dim) = (step.kv.dim(), step.kv.value_dim());
        let [k_scale, v_scale] = step.kv.scales;
        Self {
            queries,
            dim,
            value_dim,
            scale: step.options.scale * k_scale,
            value_scale: v_scale,
            soft_cap: step.options.soft_cap,
            largest: vec![f32::NEG_INFINITY; count],
            weights: vec![0.; count],
            values: vec![0.; count * value_dim],
            tile: vec![0.; count * TILE],
            row: vec![0.; dim.max(value_dim)],
        }
    }

    /// Turns the keys of a tile into weights, and scales the sums so far to them.
    fn score<'k, T: Element>(&mut self, keys: impl ExactSizeIterator<Item = &'k [T]>) {
        let count = keys.len();
        let row = &mut self.row[..self.dim];
        // The outer loop is over keys, so that each is read once for all queries.
        for (at, key) in keys.enumerate() {
            T::widen_all(key, row);
            let tiles = self.tile.chunks_exact_mut(TILE);
            for (query, tile) in self.queries.chunks_exact(self.dim).zip(tiles) {
                tile[at] = capped(dot(query, row) * self.scale, self.soft_cap);
            }
        }
        let queries = self.tile.chunks_exact_mut(TILE).enumerate();
        for (query, tile) in queries {
            let scores = &mut tile[..count];
            let old = self.largest[query];
            // `f32::max` ignores NaN. A score that is NaN makes its own weight NaN below.
            let new = scores.iter().copied().fold(old, f32::max);
            // Without a score above `-inf` so far, all weights are 0.
            let is_nothing = new == f32::NEG_INFINITY;
            let fade = if is_nothing { 1. } else { (old - new).exp() };
            for score in &mut *scores {
                *score = match is_nothing && *score == new {
                    true => 0.,
                    false => (*score - new).exp(),
                };
            }
            self.largest[query] = new;
            self.weights[query] = self.weights[query] * fade + scores.iter().sum::<f32>();
            if fade != 1. {
                let values = &mut self.values[query * self.value_dim..][..self.value_dim];
                values.iter_mut().for_each(|value| *value *= fade);
            }
        }
    }

    /// Adds the values of the tile that was scored last.
    fn add<'v, T: Element>(&mut self, values: impl Iterator<Item = &'v [T]>) {
        let row = &mut self.row[..self.value_dim];
        for (at, value) in values.enumerate() {
            T::widen_all(value, row);
            let sums = self.values.chunks_exact_mut(self.value_dim);
            for (sums, tile) in sums.zip(self.tile.chunks_exact(TILE)) {
                let weight = tile[at];
                for (sum, value) in sums.iter_mut().zip(&*row) {
                    *sum += weight * value;
                }
            }
        }
    }

    /// Returns the results, `[queries, value_dim]`. If all scores are `-inf`, they are NaN.
    fn finish(mut self) -> Vec<f32> {
        let sums = self.values.chunks_exact_mut(self.value_dim);
        for (sums, weights) in sums.zip(&self.weights) {
            for sum in sums {
                *sum = *sum / weights * self.value_scale;
            }
        }
        self.values
    }
}
