//! The checked sizes of an attention.

use super::options::Mask;
use super::stream::check_device;
use candle_core::error::MatMulUnexpectedStriding;
use candle_core::{DType, Error, Layout, Result, Shape, Tensor};
use std::ops::Range;

/// The operation's name in errors.
pub const NAME: &str = "gqa";

/// The sizes of queries `[batch, kv_heads * group, queries, dim]`, of K `[batch, kv_heads, keys,
/// dim]`, and of V `[batch, kv_heads, keys, value_dim]`. Only `queries` may be 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    pub batch: usize,
    pub kv_heads: usize,
    /// Query heads that share a head of K and V.
    pub group: usize,
    pub queries: usize,
    pub keys: usize,
    pub dim: usize,
    pub value_dim: usize,
}

impl Sizes {
    /// Checks that three tensors fit together, and returns their sizes.
    pub fn from_tensors(q: &Tensor, k: &Tensor, v: &Tensor, mask: Mask) -> Result<Self> {
        if !matches!(q.dtype(), DType::F16 | DType::BF16 | DType::F32) {
            return Err(Error::UnsupportedDTypeForOp(q.dtype(), NAME));
        }
        for other in [k, v] {
            if other.dtype() != q.dtype() {
                return Err(Error::DTypeMismatchBinaryOp {
                    lhs: q.dtype(),
                    rhs: other.dtype(),
                    op: NAME,
                });
            }
            check_device(q, other, NAME)?;
        }
        let sizes = Self::from_shapes(q.shape(), k.shape(), v.shape(), mask)?;
        for (other, dim) in [(k, sizes.dim), (v, sizes.value_dim)] {
            if dim > 1 && other.stride()[3] != 1 {
                return Err(sizes.unexpected_strides(
                    q.layout(),
                    other.layout(),
                    "the last dimension of K and V must be contiguous",
                ));
            }
        }
        Ok(sizes)
    }

    fn from_shapes(q: &Shape, k: &Shape, v: &Shape, mask: Mask) -> Result<Self> {
        let four = |shape: &Shape| {
            <[usize; 4]>::try_from(shape.dims()).map_err(|_| Error::UnexpectedNumberOfDims {
                expected: 4,
                got: shape.rank(),
                shape: shape.clone(),
            })
        };
        let [batch, heads, queries, dim] = four(q)?;
        let [k_batch, kv_heads, keys, k_dim] = four(k)?;
        let [.., value_dim] = four(v)?;
        let mismatch = |lhs: &Shape, rhs: &Shape| Error::ShapeMismatchBinaryOp {
            lhs: lhs.clone(),
            rhs: rhs.clone(),
            op: NAME,
        };
        if k.dims()[..3] != v.dims()[..3] {
            return Err(mismatch(k, v));
        }
        if [batch, heads, dim, k_batch, kv_heads, keys, k_dim, value_dim].contains(&0) {
            return Err(Error::EmptyTensor { op: NAME });
        }
        let too_many_queries = mask != Mask::None && queries > keys;
        if (batch, dim) != (k_batch, k_dim) || !heads.is_multiple_of(kv_heads) || too_many_queries {
            return Err(mismatch(q, k));
        }
        Ok(Self {
            batch,
            kv_heads,
            group: heads / kv_heads,
            queries,
            keys,
            dim,
            value_dim,
        })
    }

    /// Returns the number of heads of the queries and of the result.
    pub fn query_heads(&self) -> usize {
        self.kv_heads * self.group
    }

    /// Returns the number of query rows that use one head of K and V.
    pub fn rows(&self) -> usize {
        self.group * self.queries
    }

    /// Returns the keys that a query sees.
    pub fn seen(&self, mask: Mask, query: usize) -> Range<usize> {
        let end = || self.keys - self.queries + query + 1;
        match mask {
            Mask::None => 0..self.keys,
            Mask::Causal => 0..end(),
            Mask::Window(window) => end().saturating_sub(window)..end(),
        }
    }

    /// Returns the shape of the result.
    pub fn shape(&self) -> Shape {
        (self.batch, self.query_heads(), self.queries, self.value_dim).into()
    }

    /// Makes the error for strides that are not supported.
    pub fn unexpected_strides(&self, q: &Layout, other: &Layout, msg: &'static str) -> Error {
        Error::MatMulUnexpectedStriding(Box::new(MatMulUnexpectedStriding {
            lhs_l: q.clone(),
            rhs_l: other.clone(),
            bmnk: (self.batch * self.kv_heads, self.rows(), self.keys, self.dim),
            msg,
        }))
    }
}
