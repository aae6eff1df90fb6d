//! The checked sizes of an attention.

use candle_core::error::MatMulUnexpectedStriding;
use candle_core::{DType, Error, Layout, Result, Shape, Tensor};

/// The operation's name in errors.
pub const NAME: &str = "gqa";

/// The sizes of queries `[batch, kv_heads * group, queries, dim]` and of K and V `[batch, kv_heads,
/// keys, dim]`. Only `queries` may be 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    pub batch: usize,
    pub kv_heads: usize,
    /// Query heads that share a head of K and V.
    pub group: usize,
    pub queries: usize,
    pub keys: usize,
    pub dim: usize,
}

impl Sizes {
    /// Checks that three tensors fit together, and returns their sizes.
    pub fn from_tensors(q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> Result<Self> {
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
            let (lhs, rhs) = (q.device().location(), other.device().location());
            if lhs != rhs {
                return Err(Error::DeviceMismatchBinaryOp { lhs, rhs, op: NAME });
            }
        }
        let sizes = Self::from_shapes(q.shape(), k.shape(), v.shape(), causal)?;
        for other in [k, v] {
            if sizes.dim > 1 && other.stride()[3] != 1 {
                return Err(sizes.unexpected_strides(
                    q.layout(),
                    other.layout(),
                    "the last dimension of K and V must be contiguous",
                ));
            }
        }
        Ok(sizes)
    }

    fn from_shapes(q: &Shape, k: &Shape, v: &Shape, causal: bool) -> Result<Self> {
        let four = |shape: &Shape| {
            <[usize; 4]>::try_from(shape.dims()).map_err(|_| Error::UnexpectedNumberOfDims {
                expected: 4,
                got: shape.rank(),
                shape: shape.clone(),
            })
        };
        let [batch, heads, queries, dim] = four(q)?;
        let [k_batch, kv_heads, keys, k_dim] = four(k)?;
        four(v)?;
        let mismatch = |lhs: &Shape, rhs: &Shape| Error::ShapeMismatchBinaryOp {
            lhs: lhs.clone(),
            rhs: rhs.clone(),
            op: NAME,
        };
        if k != v {
            return Err(mismatch(k, v));
        }
        if [batch, heads, dim, k_batch, kv_heads, keys, k_dim].contains(&0) {
            return Err(Error::EmptyTensor { op: NAME });
        }
        let too_many_queries = causal && queries > keys;
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

    /// Returns how many keys a query sees with a causal mask: its own and all before. The last
    /// query's own key is the last.
    pub fn keys_seen(&self, query: usize) -> usize {
        self.keys - self.queries + query + 1
    }

    /// Returns the shape of the result.
    pub fn shape(&self) -> Shape {
        (self.batch, self.query_heads(), self.queries, self.dim).into()
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
