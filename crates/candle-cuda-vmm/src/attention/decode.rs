//! Attention of decode steps.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::cpu_decode;
use super::kv_batch::KvBatch;
use super::kv_memory::KvMemory;
use super::options::GqaOptions;
use super::plan::DecodePlan;
use super::stream::{check_device, is_same_stream};
use crate::error::VmmError;
use candle_core::{DType, Device, Error, Result, Shape, Tensor};

/// The operation's name in errors.
const NAME: &str = "decode";

/// Computes the attention of one query for each sequence of a batch, reading K and V in place.
///
/// # Shapes
/// `q` is `[batch, query_heads, dim]`. The result is `[batch, query_heads, value_dim]`, contiguous,
/// in the dtype of `q`. `query_heads` is a multiple of the number of heads of K and V, which
/// neighbouring query heads share, as in [`gqa`](super::gqa).
///
/// # Keys
/// The query is that of the last token of its sequence, which is in the cache already
/// ([`write`](super::write)). With [`Mask::None`](super::Mask::None) and
/// [`Mask::Causal`](super::Mask::Causal) it sees all tokens of its sequence, and with
/// [`Mask::Window`](super::Mask::Window) the last ones. Rows behind the length or before the window
/// are not read, so they need no memory and may hold anything. The result of a sequence whose
/// length is 0 is zeros: so a batch may have more rows than sequences.
///
/// # Numbers
/// `q` is F16, BF16 or F32. K and V have the same dtype, or F8E4M3 if `q` is F16 or BF16. Scores
/// and sums are F32. A NaN in a key or a value that the query sees makes the result NaN. So does a
/// score of `+inf`, and if all scores are `-inf`.
///
/// The same inputs and the same plan give the same bits. Another GPU splits the keys otherwise, so
/// sums are rounded otherwise. Whatever the split, results of random inputs with outliers are
/// within 1e-6 (F32), 1e-3 (F16) and 6e-3 (BF16) of double precision, as a ratio of norms.
///
/// # On a CPU device
/// Each sequence and each head of K and V is a task for rayon's threads. The same inputs give the
/// same bits, whatever the number of threads.
///
/// # On a GPU
/// It launches the kernels of the feature `attention` on the device's stream, calls nothing that
/// waits, and allocates only the result. Heads of K and V have at most 256 elements, and a multiple
/// of 16 bytes. In builds with `debug_assertions` it [checks](KvBatch::check) lengths and tables
/// first, which waits.
///
/// # Errors
/// Candle's errors, with `decode` as the operation:
/// - `UnsupportedDTypeForOp`, `DTypeMismatchBinaryOp`, `DeviceMismatchBinaryOp` and
///   `UnexpectedNumberOfDims` if a dtype, a device or a rank is not as above.
/// - `ShapeMismatchBinaryOp` if batch or dim differ, or if `query_heads` is no multiple of the
///   heads of K and V. `EmptyTensor` if there are no query heads.
///
/// [`VmmError::find`] returns the others:
/// - [`InvalidAttention`](VmmError::InvalidAttention), as [`gqa_with`](super::gqa_with).
/// - [`BeyondPlan`](VmmError::BeyondPlan) and
///   [`PlanOnAnotherDevice`](VmmError::PlanOnAnotherDevice).
/// - [`MissingLengths`](VmmError::MissingLengths) for a paged cache without lengths.
/// - [`UnsupportedHead`](VmmError::UnsupportedHead) and
///   [`NoAttentionKernels`](VmmError::NoAttentionKernels) on a GPU.
/// - The errors of [`KvBatch::check`], if lengths and tables are checked.
pub fn decode(q: &Tensor, kv: &KvBatch, options: &GqaOptions, plan: &DecodePlan) -> Result<Tensor> {
    attend(q, kv, options, plan, None)
}

/// As [`decode`], into a tensor that was made before, so that nothing is allocated.
///
/// For steps that are captured. `output` is `[batch, query_heads, value_dim]`, contiguous, in the
/// dtype of `q` and on its stream. What it held is lost. Tensors that share its memory change too,
/// so it shares none with the inputs. Candle does not know of the write: order other streams that
/// read it behind this one.
///
/// # Errors
/// As [`decode`], and with `decode` as the operation `DTypeMismatchBinaryOp`,
/// `DeviceMismatchBinaryOp`, `ShapeMismatchBinaryOp` or `RequiresContiguous` if `output` is not as
/// above, and [`InvalidAlignment`](VmmError::InvalidAlignment) if it does not begin at a multiple of
/// 16 bytes on a GPU. Then it holds what it held.
pub fn decode_into(
    q: &Tensor,
    kv: &KvBatch,
    options: &GqaOptions,
    plan: &DecodePlan,
    output: &Tensor,
) -> Result<()> {
    let (lhs, rhs, op) = (q.dtype(), output.dtype(), NAME);
    if lhs != rhs {
        return Err(Error::DTypeMismatchBinaryOp { lhs, rhs, op });
    }
    if !is_same_stream(q.device(), output.device()) {
        let (lhs, rhs) = (q.device().location(), output.device().location());
        return Err(Error::DeviceMismatchBinaryOp { lhs, rhs, op });
    }
    let (batch, query_heads, _) = q.dims3()?;
    if output.dims() != [batch, query_heads, kv.value_dim()] {
        return Err(mismatch(output, kv, NAME));
    }
    if !output.is_contiguous() {
        return Err(Error::RequiresContiguous { op });
    }
    attend(q, kv, options, plan, Some(output)).map(drop)
}

/// Writes to a tensor, if one is given, and returns that; or returns a new one.
fn attend(
    q: &Tensor,
    kv: &KvBatch,
    options: &GqaOptions,
    plan: &DecodePlan,
    output: Option<&Tensor>,
) -> Result<Tensor> {
    options.check()?;
    check_dtypes(q, kv, NAME)?;
    let (batch, query_heads, dim) = q.dims3()?;
    if query_heads == 0 {
        return Err(Error::EmptyTensor { op: NAME });
    }
    if batch != kv.batch() || !fits(kv, query_heads, dim) {
        return Err(mismatch(q, kv, NAME));
    }
    let has_kernels = q.device().is_cpu() || cfg!(feature = "attention") && q.device().is_cuda();
    if !has_kernels {
        return Err(VmmError::NoAttentionKernels.into());
    }
    plan.check(q, kv, query_heads)?;
    if kv.lengths.is_none() && matches!(kv.memory, KvMemory::Blocks { .. }) {
        return Err(VmmError::MissingLengths.into());
    }
    let q = q.contiguous()?;
    match q.device() {
        Device::Cpu => {
            let (lengths, tables) = kv.check_seen(options.mask)?;
            let made = cpu_decode::decode(&q, kv, options, &lengths, &tables)?;
            if let Some(output) = output {
                output.slice_set(&made, 0, 0)?;
            }
            Ok(made)
        }
        #[cfg(feature = "attention")]
        Device::Cuda(_) => {
            kv.check_head()?;
            if kv.is_checked() {
                kv.check_seen(options.mask)?;
            }
            super::cuda_decode::decode(&q, kv, options, plan, output)
        }
        _ => Err(VmmError::NoAttentionKernels.into()),
    }
}

/// Checks dtype and device of queries, and the dtype of K and V.
pub(super) fn check_dtypes(q: &Tensor, kv: &KvBatch, op: &'static str) -> Result<()> {
    use DType::{BF16, F8E4M3, F16, F32};
    let (lhs, rhs) = (q.dtype(), kv.dtype());
    match (lhs, rhs) {
        (F16 | BF16, F8E4M3) => {}
        (F16 | BF16 | F32, _) if lhs == rhs => {}
        (F16 | BF16 | F32, _) => return Err(Error::DTypeMismatchBinaryOp { lhs, rhs, op }),
        _ => return Err(Error::UnsupportedDTypeForOp(lhs, op)),
    }
    check_device(q, kv.memory.first(), op)
}

/// Returns whether queries with these heads fit K.
pub(super) fn fits(kv: &KvBatch, query_heads: usize, dim: usize) -> bool {
    dim == kv.dim() && query_heads.is_multiple_of(kv.kv_heads())
}

/// Makes the error if queries do not fit K `[batch, kv_heads, capacity, dim]`.
pub(super) fn mismatch(q: &Tensor, kv: &KvBatch, op: &'static str) -> Error {
    let kv = (kv.batch(), kv.kv_heads(), kv.capacity(), kv.dim());
    Error::ShapeMismatchBinaryOp {
        lhs: q.shape().clone(),
        rhs: Shape::from(kv),
        op,
    }
}
