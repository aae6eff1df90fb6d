//! The two ways in which the tokens of a sequence lie in memory.

use candle_core::{DType, Shape};
use candle_cuda_vmm::{Result, Sequence, TensorPool};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Keys and values of each layer have a range of their own.
    Apart,
    /// All layers share a range.
    OneRange,
}

impl Layout {
    pub const BOTH: [Self; 2] = [Self::Apart, Self::OneRange];

    /// Makes a sequence whose tokens have these shapes in each of some layers.
    pub fn sequence(
        self,
        pool: &TensorPool,
        layers: usize,
        [k, v]: [impl Into<Shape>; 2],
        dtype: DType,
    ) -> Result<Sequence> {
        match self {
            Self::Apart => pool.sequence().rows(k, v, dtype),
            Self::OneRange => pool.sequence().rows_in_one_range(layers, k, v, dtype),
        }
    }

    /// Returns the pages of some tokens from the first on, of which four keys or values of one
    /// layer fill a page.
    pub fn pages(self, layers: usize, tokens: usize) -> usize {
        match self {
            Self::Apart => 2 * layers * tokens.div_ceil(4),
            Self::OneRange => (2 * layers * tokens).div_ceil(4),
        }
    }
}
