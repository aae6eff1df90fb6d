//! Draws tokens from logits on the device, so that a captured step returns tokens and not logits.
//!
//! [`sample`] takes logits `[batch, vocabulary]` and returns a token for each row. What each row is
//! drawn with is in device memory ([`SampleParameters`]), so a replay of a
//! [`DecodeGraph`](crate::graph::DecodeGraph) reads what was written there since. Only tokens cross
//! to the host.
//!
//! ```
//! use candle_core::{DType, Device, Result, Tensor};
//! use candle_cuda_vmm::sampling::{SampleParameters, sample};
//!
//! # fn main() -> Result<()> {
//! let device = Device::Cpu;
//! // For the largest batch, made once. Here the second row is greedy.
//! let temperature = Tensor::new(&[0.8f32, 0.], &device)?;
//! let top_p = Tensor::new(&[0.95f32, 1.], &device)?;
//! let seed = Tensor::new(&[[7u32, 0], [8, 0]], &device)?;
//! let position = Tensor::new(&[12u32, 40], &device)?;
//! let parameters = SampleParameters::new(&temperature, &top_p, &seed, &position)?;
//!
//! let logits = Tensor::new(&[[0f32, 3., 2.9, -9.], [1., 0., 4., 4.]], &device)?;
//! let tokens = sample(&logits, &parameters)?.to_vec1::<u32>()?;
//! assert!([1, 2].contains(&tokens[0]));
//! assert_eq!(tokens[1], 2);
//!
//! // The next step: the same tensors, with other numbers.
//! position.slice_set(&Tensor::new(&[13u32, 41], &device)?, 0, 0)?;
//! let tokens = sample(&logits, &parameters)?;
//! assert_eq!(tokens.dims(), [2]);
//! # Ok(())
//! # }
//! ```
//!
//! # Which token
//! - A token's *weight* is `exp((logit - largest) / temperature)`, in units of 2^-45.
//! - The *set* is the most likely tokens whose weights together are at least `top_p` of all weights
//!   (nucleus sampling: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020). It
//!   is the smallest such set in which tokens of equal logits are either all in or all out.
//! - 64 random bits are a function of seed and position alone (Philox4x32-10). They choose a token
//!   of the set by the sums of weights in the order of tokens.
//!
//! So a request gets the same tokens whatever else is in the batch, in whichever row and bucket,
//! and after a preemption too, if its logits have the same bits there. The position is that of the
//! token in its sequence: the lengths of the sequences do, as they are on the device anyway.
//!
//! # Numbers
//! A weight is computed in F32 from the logit, converted to F32, and then it is a whole number. It
//! is within 2^-46 of the largest weight, and 1e-5 of itself, of the formula. All sums are of whole
//! numbers, hence exact. So the order of a sum changes nothing, and a GPU and the CPU return the
//! same token for the same bits of logits. A token with less than 2^-46 of the largest weight is
//! never drawn.
//!
//! # Numbers out of the ordinary
//! - A temperature that is not above 0, NaN among them, is greedy: the first of the largest logits.
//!   Others count as at least 2^-100 and at most 2^100.
//! - With a `top_p` of 1, more, or NaN the set is all tokens. With 0 or less it is those of the
//!   largest logit.
//! - A logit that is NaN counts as minus infinity. A row without any other logit gets token 0. If a
//!   logit is plus infinity, the row gets the first such token.
//!
//! No gradient flows through this function.

mod cpu;
#[cfg(feature = "attention")]
mod cuda;
mod parameters;
mod random;
mod weights;

pub use parameters::SampleParameters;

use crate::attention::stream::check_device;
use crate::error::VmmError;
use crate::fused::check::{check_dtype, check_rows};
use candle_core::{DType, Device, Error, Result, Tensor};

/// The operation's name in errors.
const NAME: &str = "sample";

/// The most tokens of a vocabulary: sums of as many weights fit in 64 bits.
const VOCABULARY_MAX: usize = 1 << 18;

/// Draws a token of each row of logits.
///
/// See [the module](self) for which token that is.
///
/// # Shapes
/// `logits` is `[batch, vocabulary]` in F32, F16 or BF16, with at most 262,144 tokens. The elements
/// of a row are side by side, and rows may have any stride. `parameters` are those of `batch`
/// sequences. The result is U32 `[batch]`.
///
/// # On a GPU
/// It is one launch on the device's stream, of the kernels of the feature `attention`. It calls
/// nothing that waits, and allocates only the result. A row that is drawn with a `top_p` below 1 is
/// read three times, one without twice, and a greedy row once. It is fastest if all rows begin at
/// multiples of 16 bytes and are as long as such a multiple.
///
/// # On a CPU device
/// Each row is a task for rayon's threads.
///
/// # Errors
/// Candle's errors, with `sample` as the operation if the error has one:
/// - `UnsupportedDTypeForOp`, `UnexpectedNumberOfDims`, `ShapeMismatchBinaryOp` and
///   `DeviceMismatchBinaryOp` if logits are not as above, or not as the parameters.
/// - `EmptyTensor` if the vocabulary is empty, and `UnexpectedShape` if it is too large.
/// - `RequiresContiguous` if the elements of a row are not side by side.
/// - `Cuda` if memory runs out, the launch fails, or the driver does not load the kernel.
///
/// [`VmmError::find`] returns [`NoAttentionKernels`](VmmError::NoAttentionKernels) on a GPU in a
/// build without the feature `attention`.
pub fn sample(logits: &Tensor, parameters: &SampleParameters) -> Result<Tensor> {
    check_dtype(logits, NAME)?;
    check_device(logits, &parameters.temperature, NAME)?;
    let (batch, vocabulary) = logits.dims2()?;
    if batch != parameters.batch() {
        return Err(Error::ShapeMismatchBinaryOp {
            lhs: logits.shape().clone(),
            rhs: parameters.temperature.shape().clone(),
            op: NAME,
        });
    }
    if vocabulary == 0 {
        return Err(Error::EmptyTensor { op: NAME });
    }
    if vocabulary > VOCABULARY_MAX {
        return Err(Error::UnexpectedShape {
            msg: format!("{NAME} takes at most {VOCABULARY_MAX} tokens"),
            expected: (batch, VOCABULARY_MAX).into(),
            got: logits.shape().clone(),
        });
    }
    check_rows(logits, NAME)?;
    let has_kernels =
        logits.device().is_cpu() || cfg!(feature = "attention") && logits.device().is_cuda();
    if !has_kernels {
        return Err(VmmError::NoAttentionKernels.into());
    }
    if batch == 0 {
        return Tensor::zeros(0, DType::U32, logits.device());
    }
    match logits.device() {
        Device::Cpu => cpu::sample(logits, parameters),
        #[cfg(feature = "attention")]
        Device::Cuda(_) => cuda::sample(logits, parameters),
        _ => Err(VmmError::NoAttentionKernels.into()),
    }
}
