//! Grouped-query attention.

use super::cpu;
use super::options::{GqaOptions, Mask};
use super::sizes::{NAME, Sizes};
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

/// The most memory in bytes for scores at once. Longer prompts are processed in parts.
const SCORES_BYTES_MAX: usize = 256 << 20;

/// The fewest queries of a part if there is a window.
pub const WINDOW_QUERIES: usize = 256;

/// Computes grouped-query attention, `softmax(scale · q · kᵀ) · v`, reading K and V in place.
///
/// This is [`gqa_with`] without a window and without a soft cap.
///
/// # Shapes
/// `q` is `[batch, query_heads, queries, dim]`, `k` is `[batch, kv_heads, keys, dim]`, and `v` is
/// `[batch, kv_heads, keys, value_dim]`. The result is `[batch, query_heads, queries, value_dim]`,
/// contiguous. With `g = query_heads / kv_heads`, the query heads `g
/// · h` to `g · h + g - 1` use head `h` of K and V. Candle's models repeat K and V for the same
/// result.
///
/// All tensors have one dtype, F16, BF16 or F32, and are on one device. Scores and sums are F32. On
/// a GPU the weights for V have the tensors' dtype.
///
/// # Strides
/// K and V may have any strides whose last is 1, and are not copied. A transposed view of
/// token-major memory `[batch, keys, kv_heads, dim]` works, and so does a part of a longer
/// reservation. On a GPU the stride from key to key must be at least
/// the size of a head. `q` is copied if it is not
/// contiguous.
///
/// # Causal mask
/// With `causal` the last query sees all keys, and each query before it one key less. That is right
/// for a prompt, with or without earlier keys. A single query sees all keys either way.
///
/// # Memory
/// Scores take at most 256 MiB at once, or the size of one query's scores if that is more. Longer
/// prompts are processed in parts, each over the keys that it sees.
///
/// # On a GPU
/// It calls `cublasGemmStridedBatchedEx` with the given strides, one softmax kernel, and
/// `cublasGemmStridedBatchedEx` again, on the device's stream. No gradient flows through it.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_cuda_vmm::attention::gqa;
///
/// # fn main() -> candle_core::Result<()> {
/// let q = Tensor::randn(0f32, 1., (1, 32, 1, 128), &Device::Cpu)?;
/// let token_major = Tensor::randn(0f32, 1., (1, 500, 8, 128), &Device::Cpu)?;
/// let kv = token_major.transpose(1, 2)?;
/// let out = gqa(&q, &kv, &kv, 1. / 128f32.sqrt(), true)?;
/// assert_eq!(out.dims(), q.dims());
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Candle's errors, with the values, and with `gqa` as the operation if the error has one:
/// - `UnsupportedDTypeForOp`, `DTypeMismatchBinaryOp`, `DeviceMismatchBinaryOp` and
///   `UnexpectedNumberOfDims` if a dtype, a device or a rank is not as above.
/// - `ShapeMismatchBinaryOp` if `k` and `v` differ in more than the last dimension, if batch or dim
///   differ, if `query_heads` is no
///   multiple of `kv_heads`, or with `causal` if there are more queries than keys.
/// - `EmptyTensor` if any size except `queries` is 0.
/// - `MatMulUnexpectedStriding` if strides are not supported.
/// - `Cuda` if memory runs out or cuBLAS fails.
pub fn gqa(q: &Tensor, k: &Tensor, v: &Tensor, scale: f32, causal: bool) -> Result<Tensor> {
    let mask = match causal {
        true => Mask::Causal,
        false => Mask::None,
    };
    gqa_with(q, k, v, &GqaOptions::new(scale).mask(mask))
}

/// As [`gqa`], with options: a sliding window, a soft cap.
///
/// With a window, keys that no query sees are not read, so a decode step over a longer cache costs
/// what the window costs. Several queries are processed in parts of about the window's length.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_cuda_vmm::attention::{GqaOptions, Mask, gqa, gqa_with};
///
/// # fn main() -> candle_core::Result<()> {
/// let q = Tensor::randn(0f32, 1., (1, 8, 1, 64), &Device::Cpu)?;
/// let kv = Tensor::randn(0f32, 1., (1, 2, 500, 64), &Device::Cpu)?;
/// let window = GqaOptions::new(0.125).mask(Mask::Window(100));
/// let windowed = gqa_with(&q, &kv, &kv, &window)?;
/// let last = kv.narrow(2, 400, 100)?;
/// let difference = (windowed - gqa(&q, &last, &last, 0.125, true)?)?.abs()?;
/// assert!(difference.flatten_all()?.max(0)?.to_scalar::<f32>()? < 1e-6);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As [`gqa`], and [`InvalidAttention`](crate::VmmError::InvalidAttention) if the window is 0, or
/// if the soft cap is not more than 0 or not finite. [`VmmError::find`](crate::VmmError::find)
/// returns that.
pub fn gqa_with(q: &Tensor, k: &Tensor, v: &Tensor, options: &GqaOptions) -> Result<Tensor> {
    in_parts(q, k, v, options, SCORES_BYTES_MAX)
}

/// Splits the queries so that the scores of each part take at most `scores_bytes_max` bytes.
fn in_parts(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &GqaOptions,
    scores_bytes_max: usize,
) -> Result<Tensor> {
    options.check()?;
    let sizes = Sizes::from_tensors(q, k, v, options.mask)?;
    if sizes.queries == 0 {
        return Tensor::zeros(sizes.shape(), q.dtype(), q.device());
    }
    #[cfg(feature = "attention")]
    if let Some(result) = by_kernel(q, k, v, options)? {
        return Ok(result);
    }
    let (queries_max, keys) = match options.mask {
        // Longer parts would have more scores of keys that a query does not see.
        Mask::Window(window) => {
            let queries = window.max(WINDOW_QUERIES);
            (queries, sizes.keys.min(queries.saturating_add(window)))
        }
        _ => (sizes.queries, sizes.keys),
    };
    let bytes_of_query = sizes.batch * sizes.query_heads() * keys * size_of::<f32>();
    let part = (scores_bytes_max / bytes_of_query).clamp(1, sizes.queries.min(queries_max));
    let mut results = Vec::new();
    for first in (0..sizes.queries).step_by(part) {
        let queries = part.min(sizes.queries - first);
        let seen = |query| sizes.seen(options.mask, query);
        let (start, end) = (seen(first).start, seen(first + queries - 1).end);
        let attention = Attention {
            options: *options,
            sizes: Sizes {
                queries,
                keys: end - start,
                ..sizes
            },
        };
        let q = q.narrow(2, first, queries)?.contiguous()?;
        let (k, v) = (
            k.narrow(2, start, end - start)?,
            v.narrow(2, start, end - start)?,
        );
        results.push(q.apply_op3_no_bwd(&k, &v, &attention)?);
    }
    match results.len() {
        1 => Ok(results.remove(0)),
        _ => Tensor::cat(&results, 2),
    }
}

/// Computes the attention of one query for each sequence by a kernel. Returns `None` if there is
/// none for this device or for these tensors, or if there are several queries.
#[cfg(feature = "attention")]
fn by_kernel(q: &Tensor, k: &Tensor, v: &Tensor, options: &GqaOptions) -> Result<Option<Tensor>> {
    use crate::error::VmmError;
    let (batch, query_heads, queries, _) = q.dims4()?;
    if queries != 1 || !q.device().is_cuda() {
        return Ok(None);
    }
    let attend = || {
        let kv = super::KvBatch::rows(k, v)?;
        let plan = super::DecodePlan::new(q.device(), batch, query_heads)?;
        super::decode(&q.squeeze(2)?, &kv, options, &plan)?.unsqueeze(2)
    };
    match attend() {
        Ok(result) => Ok(Some(result)),
        Err(error) => match VmmError::find(&error) {
            Some(
                VmmError::NoAttentionKernels
                | VmmError::UnsupportedHead { .. }
                | VmmError::InvalidAlignment { .. },
            ) => Ok(None),
            _ => Err(error),
        },
    }
}

/// The operation on one part of the queries, whose scores fit in memory at once.
struct Attention {
    options: GqaOptions,
    sizes: Sizes,
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let inputs = [(q, q_layout), (k, k_layout), (v, v_layout)];
        let result = cpu::attend(&self.sizes, &self.options, inputs)?;
        Ok((result, self.sizes.shape()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &candle_core::CudaStorage,
        q_layout: &Layout,
        k: &candle_core::CudaStorage,
        k_layout: &Layout,
        v: &candle_core::CudaStorage,
        v_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let inputs = [(q, q_layout), (k, k_layout), (v, v_layout)];
        let result = super::cuda::attend(&self.sizes, &self.options, inputs)?;
        Ok((result, self.sizes.shape()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn random(shape: (usize, usize, usize, usize)) -> Tensor {
        Tensor::randn(0f32, 1., shape, &Device::Cpu).unwrap()
    }

    #[track_caller]
    fn assert_alike(left: &Tensor, right: &Tensor) {
        assert_eq!(left.dims(), right.dims());
        let difference = (left - right).unwrap().abs().unwrap();
        let largest = difference.flatten_all().unwrap().max(0).unwrap();
        let largest = largest.to_scalar::<f32>().unwrap();
        assert!(largest < 1e-5, "{largest}");
    }

    #[test]
    fn parts_make_the_whole() {
        let (q, kv) = (random((2, 4, 7, 8)), random((2, 9, 2, 8)));
        let k = kv.transpose(1, 2).unwrap();
        let v = (&k * 0.5).unwrap();
        let bytes_of_query = 2 * 4 * 9 * 4;
        for mask in [
            Mask::None,
            Mask::Causal,
            Mask::Window(1),
            Mask::Window(4),
            Mask::Window(99),
        ] {
            let options = GqaOptions::new(0.3).mask(mask);
            let whole = gqa_with(&q, &k, &v, &options).unwrap();
            for part in [0, 1, 2, 3, 6, 7] {
                let parts = in_parts(&q, &k, &v, &options, part * bytes_of_query).unwrap();
                assert_alike(&whole, &parts);
            }
        }
    }

    #[test]
    fn a_query_of_a_prompt_gets_what_it_gets_alone() {
        let (q, k, v) = (
            random((1, 6, 5, 16)),
            random((1, 3, 8, 16)),
            random((1, 3, 8, 16)),
        );
        let prompt = gqa(&q, &k, &v, 0.25, true).unwrap();
        for query in 0..5 {
            let keys = 8 - 5 + query + 1;
            let alone = gqa(
                &q.narrow(2, query, 1).unwrap(),
                &k.narrow(2, 0, keys).unwrap(),
                &v.narrow(2, 0, keys).unwrap(),
                0.25,
                true,
            );
            assert_alike(&prompt.narrow(2, query, 1).unwrap(), &alone.unwrap());
        }
    }

    #[test]
    fn one_key_gives_its_value_and_equal_keys_the_mean() {
        let v = random((1, 1, 4, 3));
        let k = Tensor::zeros((1, 1, 4, 3), candle_core::DType::F32, &Device::Cpu).unwrap();
        let q = random((1, 2, 1, 3));
        let mean = v.mean_keepdim(2).unwrap().expand((1, 2, 1, 3)).unwrap();
        assert_alike(&gqa(&q, &k, &v, 1., false).unwrap(), &mean);
        let (k, v) = (k.narrow(2, 1, 1).unwrap(), v.narrow(2, 1, 1).unwrap());
        let value = v.expand((1, 2, 1, 3)).unwrap();
        assert_alike(&gqa(&q, &k, &v, 1., true).unwrap(), &value);
    }

    #[test]
    fn no_queries_give_nothing() {
        let (q, kv) = (random((1, 2, 0, 4)), random((1, 2, 3, 4)));
        let v = random((1, 2, 3, 5));
        assert_eq!(gqa(&q, &kv, &v, 1., true).unwrap().dims(), [1, 2, 0, 5]);
    }
}
