//! The sizes of an attention, checked.

use candle_core::error::MatMulUnexpectedStriding;
use candle_core::{DType, Error, Layout, Result, Shape, Tensor};

/// The operation's name in errors.
pub const NAME: &str = "gqa";

/// How many of everything there are: queries `[batch, kv_heads * group, queries, dim]`, K and V
/// `[batch, kv_heads, keys, dim]`. None is 0, but `queries` may be.
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
    /// Those of three tensors, which must fit each other.
    pub fn of(q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> Result<Self> {
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
        let sizes = Self::of_shapes(q.shape(), k.shape(), v.shape(), causal)?;
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

    fn of_shapes(q: &Shape, k: &Shape, v: &Shape, causal: bool) -> Result<Self> {
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

    /// Heads of the queries, and of the result.
    pub fn query_heads(&self) -> usize {
        self.kv_heads * self.group
    }

    /// Rows of queries that meet one head of K and V.
    pub fn rows(&self) -> usize {
        self.group * self.queries
    }

    /// How many keys a query sees, causally: its own, which is the last for the last query, and those before.
    pub fn keys_seen(&self, query: usize) -> usize {
        self.keys - self.queries + query + 1
    }

    /// The shape of the result.
    pub fn shape(&self) -> Shape {
        (self.batch, self.query_heads(), self.queries, self.dim).into()
    }

    /// The error for strides that cannot be used.
    pub fn unexpected_strides(&self, q: &Layout, other: &Layout, msg: &'static str) -> Error {
        Error::MatMulUnexpectedStriding(Box::new(MatMulUnexpectedStriding {
            lhs_l: q.clone(),
            rhs_l: other.clone(),
            bmnk: (self.batch * self.kv_heads, self.rows(), self.keys, self.dim),
            msg,
        }))
    }
}
