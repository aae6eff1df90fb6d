//! Writes new tokens to K and V, with a rotary embedding.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::cpu_write;
use super::decode::{check_dtypes, mismatch};
use super::kv_batch::KvBatch;
use super::rotary::Rotary;
use super::slots::Slots;
use super::stream::check_device;
use crate::error::VmmError;
use candle_core::{DType, Device, Error, Result, Tensor};

/// The operation's name in errors.
const NAME: &str = "write";

/// Rotates the queries and keys of new tokens, and writes their keys and values to K and V.
///
/// Call it before [`decode`](super::decode) or [`prompt`](super::prompt), whose queries see these
/// tokens too. It writes in place: tensors that share memory with K or V change.
///
/// # Shapes
/// `q` is `[tokens, query_heads, dim]`, `k` is `[tokens, kv_heads, dim]`, and `v` is `[tokens,
/// kv_heads, value_dim]`, in one dtype: F16, BF16 or F32. K and V of the batch have the same dtype,
/// or F8E4M3 if that is F16 or BF16. The result is the rotated `q`, contiguous. `q`, `k` and `v` may
/// have any strides. They are not copied if the elements of a head are side by side, so they may be
/// parts of one product's result.
///
/// `rotary` is the table and the position of each token, U32 `[tokens]`, contiguous. Without it
/// nothing is rotated. Rotations are computed in F32.
///
/// [`Slots`] says which rows are written.
///
/// # Numbers
/// What is stored is the number divided by its scale ([`KvBatch::scales`]), rounded to the nearest.
/// F8E4M3 saturates at 448.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_cuda_vmm::attention::{KvBatch, Slots, write};
///
/// # fn main() -> candle_core::Result<()> {
/// let device = Device::Cpu;
/// // Two sequences with room for 16 tokens; the new tokens are the 4th and the 9th.
/// let cache = Tensor::zeros((2, 2, 16, 8), DType::F32, &device)?;
/// let lengths = Tensor::new(&[4u32, 9], &device)?;
/// let kv = KvBatch::rows(&cache, &cache.copy()?)?.lengths(&lengths)?;
/// let (q, new) = (Tensor::ones((2, 4, 8), DType::F32, &device)?, cache.narrow(2, 0, 1)?);
/// let new = (new.squeeze(2)? + 1.)?;
/// write(&q, &new, &new, None, &kv, Slots::Last)?;
/// let row = cache.narrow(0, 1, 1)?.narrow(2, 8, 1)?;
/// assert_eq!(row.flatten_all()?.to_vec1::<f32>()?, [1.; 16]);
/// # Ok(())
/// # }
/// ```
///
/// # On a GPU
/// It launches the kernels of the feature `attention` on the device's stream, calls nothing that
/// waits, and allocates only the result. In builds with `debug_assertions` it checks rows, tables
/// and positions first, which waits, except during a stream capture.
///
/// # Errors
/// Nothing is written then. Candle's errors, with `write` as the operation:
/// - `UnsupportedDTypeForOp`, `DTypeMismatchBinaryOp`, `DeviceMismatchBinaryOp`,
///   `UnexpectedNumberOfDims` and `ShapeMismatchBinaryOp` if a tensor is not as above, or if
///   the rotary table rotates more elements than a head has.
/// - `RequiresContiguous` if positions or slots are not contiguous, or if K or V of the batch are
///   broadcast, so that rows share memory.
///
/// [`VmmError::find`] returns the others:
/// - [`MissingLengths`](VmmError::MissingLengths) for [`Slots::Last`] without lengths.
/// - [`NoAttentionKernels`](VmmError::NoAttentionKernels) and
///   [`UnsupportedHead`](VmmError::UnsupportedHead) on a GPU.
///
/// If rows are checked, on a CPU device always:
/// - [`LengthBeyondCapacity`](VmmError::LengthBeyondCapacity) for [`Slots::Last`].
/// - [`UnknownSequence`](VmmError::UnknownSequence) and
///   [`RowBeyondCapacity`](VmmError::RowBeyondCapacity) for [`Slots::At`].
/// - [`UnknownPosition`](VmmError::UnknownPosition).
/// - The errors of [`KvBatch::check`] for the block of a row.
pub fn write(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    rotary: Option<(&Rotary, &Tensor)>,
    kv: &KvBatch,
    slots: Slots<'_>,
) -> Result<Tensor> {
    check_tensors(q, k, v, kv)?;
    check_rotary(q, rotary)?;
    check_slots(q, kv, slots)?;
    match q.device() {
        Device::Cpu => {
            let (rows, tables) = kv.check_slots(slots)?;
            check_positions(rotary)?;
            cpu_write::write([q, k, v], rotary, kv, &rows, &tables)
        }
        #[cfg(feature = "attention")]
        Device::Cuda(_) => {
            kv.check_head()?;
            if kv.is_checked() {
                kv.check_slots(slots)?;
                check_positions(rotary)?;
            }
            super::cuda_write::write([q, k, v], rotary, kv, slots)
        }
        _ => Err(VmmError::NoAttentionKernels.into()),
    }
}

fn check_tensors(q: &Tensor, k: &Tensor, v: &Tensor, kv: &KvBatch) -> Result<()> {
    check_dtypes(q, kv, NAME)?;
    for other in [k, v] {
        let (lhs, rhs, op) = (q.dtype(), other.dtype(), NAME);
        if lhs != rhs {
            return Err(Error::DTypeMismatchBinaryOp { lhs, rhs, op });
        }
        check_device(q, other, NAME)?;
    }
    let (tokens, _, dim) = q.dims3()?;
    if dim != kv.dim() {
        return Err(mismatch(q, kv, NAME));
    }
    for (new, dim) in [(k, kv.dim()), (v, kv.value_dim())] {
        if new.dims3()? != (tokens, kv.kv_heads(), dim) {
            return Err(mismatch(new, kv, NAME));
        }
    }
    match kv.is_broadcast() {
        true => Err(Error::RequiresContiguous { op: NAME }),
        false => Ok(()),
    }
}

fn check_rotary(q: &Tensor, rotary: Option<(&Rotary, &Tensor)>) -> Result<()> {
    let Some((rotary, positions)) = rotary else {
        return Ok(());
    };
    check_device(q, &rotary.cos, NAME)?;
    let (tokens, _, dim) = q.dims3()?;
    if rotary.dim() > dim {
        let (lhs, rhs) = (q.shape().clone(), rotary.cos.shape().clone());
        return Err(Error::ShapeMismatchBinaryOp { lhs, rhs, op: NAME });
    }
    check_index(q, positions, tokens)
}

fn check_slots(q: &Tensor, kv: &KvBatch, slots: Slots<'_>) -> Result<()> {
    let tokens = q.dims()[0];
    match slots {
        Slots::Last if kv.lengths.is_none() => Err(VmmError::MissingLengths.into()),
        Slots::Last if tokens != kv.batch() => Err(mismatch(q, kv, NAME)),
        Slots::Last => Ok(()),
        Slots::At { sequences, rows } => {
            check_index(q, sequences, tokens)?;
            check_index(q, rows, tokens)
        }
    }
}

/// Checks a tensor with a number for each token.
fn check_index(q: &Tensor, index: &Tensor, tokens: usize) -> Result<()> {
    if index.dtype() != DType::U32 {
        return Err(Error::UnsupportedDTypeForOp(index.dtype(), NAME));
    }
    check_device(q, index, NAME)?;
    if index.dims1()? != tokens {
        let (lhs, rhs) = (q.shape().clone(), index.shape().clone());
        return Err(Error::ShapeMismatchBinaryOp { lhs, rhs, op: NAME });
    }
    match index.is_contiguous() {
        true => Ok(()),
        false => Err(Error::RequiresContiguous { op: NAME }),
    }
}

/// Checks on the host that the table has every position.
fn check_positions(rotary: Option<(&Rotary, &Tensor)>) -> Result<()> {
    let Some((rotary, positions)) = rotary else {
        return Ok(());
    };
    let positions_max = rotary.positions_max();
    let positions = positions.to_vec1::<u32>()?;
    let mut positions = positions.into_iter().map(|position| position as usize);
    match positions
        .clone()
        .position(|position| position >= positions_max)
    {
        None => Ok(()),
        Some(token) => Err(VmmError::UnknownPosition {
            token,
            position: positions.nth(token).unwrap_or_default(),
            positions_max,
        }
        .into()),
    }
}
