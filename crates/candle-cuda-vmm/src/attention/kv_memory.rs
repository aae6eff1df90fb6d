//! Where K and V of a batch of sequences are.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use crate::error::{Result, VmmError};
use candle_core::Tensor;
use std::sync::Arc;

/// K or V.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    K,
    V,
}

/// The memory of K and V.
#[derive(Clone, Debug)]
pub enum KvMemory {
    /// `[batch, kv_heads, capacity, dim]` each.
    Rows { k: Tensor, v: Tensor },
    /// `[1, kv_heads, capacity, dim]` each, one pair for each sequence.
    Sequences {
        pairs: Arc<[(Tensor, Tensor)]>,
        capacities: Arc<[usize]>,
        /// I64 `[batch, 3]` on a CUDA device: address of K, address of V, capacity.
        #[allow(dead_code, reason = "kernels follow it, with the feature `attention`")]
        addresses: Option<Tensor>,
    },
    /// `[num_blocks, block_size, kv_heads, dim]` each, and a table U32 `[batch, blocks_max]`.
    Blocks {
        k: Tensor,
        v: Tensor,
        tables: Tensor,
        block_size: usize,
    },
}

impl KvMemory {
    /// Returns the tensors of K or of V: one for each sequence, or one for all.
    pub fn tensors(&self, side: Side) -> Vec<&Tensor> {
        match (self, side) {
            (Self::Rows { k: tensor, .. } | Self::Blocks { k: tensor, .. }, Side::K)
            | (Self::Rows { v: tensor, .. } | Self::Blocks { v: tensor, .. }, Side::V) => {
                vec![tensor]
            }
            (Self::Sequences { pairs, .. }, Side::K) => pairs.iter().map(|(k, _)| k).collect(),
            (Self::Sequences { pairs, .. }, Side::V) => pairs.iter().map(|(_, v)| v).collect(),
        }
    }

    /// Returns K; that of the first sequence if each has its own.
    pub fn first(&self) -> &Tensor {
        match self {
            Self::Rows { k, .. } | Self::Blocks { k, .. } => k,
            // There is at least one sequence.
            Self::Sequences { pairs, .. } => &pairs[0].0,
        }
    }
}

/// The sizes of K and V. None is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvSizes {
    /// Sequences.
    pub batch: usize,
    pub kv_heads: usize,
    /// The most tokens of a sequence.
    pub capacity: usize,
    pub dim: usize,
    pub value_dim: usize,
}

/// The strides of K or V, in elements. The last dimension is contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvStrides {
    /// From one sequence to the next in rows, from one block to the next in blocks, 0 otherwise.
    pub outer: usize,
    pub head: usize,
    pub token: usize,
}

impl KvStrides {
    /// Returns the strides that all pairs `[1, kv_heads, capacity, dim]` have. A stride between
    /// things of which there is one is not compared.
    pub fn of_sequences(pairs: &[(Tensor, Tensor)]) -> Result<[Self; 2]> {
        let strides = |(k, v): &(Tensor, Tensor)| {
            let of = |tensor: &Tensor| [tensor.stride()[1], tensor.stride()[2]];
            [of(k), of(v)].concat()
        };
        // A cache of several tokens has strides that count.
        let has_several = |(k, _): &&(Tensor, Tensor)| k.dims()[2] > 1;
        let model = pairs.iter().find(has_several).unwrap_or(&pairs[0]);
        let expected = strides(model);
        for (sequence, pair) in pairs.iter().enumerate() {
            let found = strides(pair);
            let counts = [pair.0.dims()[1] > 1, pair.0.dims()[2] > 1].repeat(2);
            let mut all = found.iter().zip(&expected).zip(counts);
            if !all.all(|((found, expected), counts)| found == expected || !counts) {
                return Err(VmmError::DifferentStrides {
                    sequence,
                    strides: found,
                    expected,
                });
            }
        }
        let of = |head, token| Self {
            outer: 0,
            head,
            token,
        };
        Ok([of(expected[0], expected[1]), of(expected[2], expected[3])])
    }
}
