//! The errors of this crate.
//!
//! All variants of 0.1.1 are here, with their fields. [`VmmError::Vmm`] is new: it carries an error
//! of [`cuda_vmm`] for which 0.1.1 has no variant.

mod graph;
mod weights;

pub use graph::GraphError;
use std::sync::Arc;
use thiserror::Error;
pub use weights::WeightsError;

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, VmmError>;

/// An error of this crate.
///
/// An error of [`cuda_vmm`] becomes the variant of 0.1.1 with the same meaning. If there is none,
/// it becomes [`Vmm`](Self::Vmm):
///
/// | `cuda_vmm::VmmError` | here |
/// |---|---|
/// | `OutOfVirtualMemory` | [`OutOfVirtualMemory`](Self::OutOfVirtualMemory) |
/// | `OutOfPhysicalMemory` | [`Vmm`](Self::Vmm) with all its fields from tensors, caches and blocks; [`OutOfPhysicalMemory`](Self::OutOfPhysicalMemory) from [`VirtualMemoryPool`](crate::VirtualMemoryPool) and [`SharedMemoryPool`](crate::SharedMemoryPool), as in 0.1.1 |
/// | `OutOfRange`, `Overflow` | [`InvalidOffset`](Self::InvalidOffset) |
/// | `Misaligned` | [`InvalidAlignment`](Self::InvalidAlignment) |
/// | `AlreadyMapped`, `NotMapped` | the same |
/// | `InvalidPageSize` | the same |
/// | `UnsupportedDevice` | the same |
/// | `ModelNotFound` | the same |
/// | `ModelAlreadyRegistered` | [`ModelAlreadyExists`](Self::ModelAlreadyExists) |
/// | any other, such as a failed driver call | [`Vmm`](Self::Vmm) |
#[derive(Debug, Error)]
pub enum VmmError {
    /// A CUDA call failed; the text describes it.
    ///
    /// `from_cuda_result` and [`cuda`](Self::cuda) make it. This crate's own driver calls fail with
    /// [`Vmm`](Self::Vmm), which has the call and its code.
    #[error("CUDA error: {0}")]
    CudaError(String),

    /// No run of unused addresses is long enough.
    #[error("out of virtual address space: {requested} bytes requested, {available} available")]
    OutOfVirtualMemory {
        /// Bytes asked for.
        requested: usize,
        /// The largest unused run, in bytes.
        available: usize,
    },

    /// The memory budget is exhausted. Nothing was allocated.
    ///
    /// [`shortage`](Self::shortage) returns the same data for this variant and for the core's.
    #[error("out of physical memory: {requested} bytes requested, {available} available")]
    OutOfPhysicalMemory {
        /// Bytes of physical memory that the request still needed.
        requested: usize,
        /// Bytes that were free.
        available: usize,
    },

    /// The bytes lie outside of the range, or `offset + size` overflows.
    #[error("invalid offset: {offset} (size: {size}, capacity: {capacity})")]
    InvalidOffset {
        /// First byte.
        offset: usize,
        /// Length in bytes.
        size: usize,
        /// Capacity of the range in bytes; `usize::MAX` if the end overflows and the range is not
        /// known.
        capacity: usize,
    },

    /// The memory cannot be mapped as requested.
    #[error("mapping failed: {0}")]
    MappingFailed(String),

    /// The memory cannot be unmapped as requested.
    #[error("unmapping failed: {0}")]
    UnmappingFailed(String),

    /// A value is not a multiple of the required alignment.
    #[error("invalid alignment: {actual}, required: {required}")]
    InvalidAlignment {
        /// The value in bytes.
        actual: usize,
        /// The required alignment in bytes; 0 if any power of two is valid.
        required: usize,
    },

    /// Some of the bytes are already allocated or mapped.
    #[error("range already mapped: offset {offset}, size {size}")]
    AlreadyMapped {
        /// First byte.
        offset: usize,
        /// Length in bytes.
        size: usize,
    },

    /// Some of the bytes are not allocated or not mapped.
    #[error("range not mapped: offset {offset}, size {size}")]
    NotMapped {
        /// First byte.
        offset: usize,
        /// Length in bytes.
        size: usize,
    },

    /// The page size is not a power of two, or is below the device's granularity.
    #[error(
        "invalid page size: {0} (it must be a power of two, and at least the device's allocation granularity)"
    )]
    InvalidPageSize(usize),

    /// The device has no virtual memory management, or this build does not support its kind.
    #[error("the device does not support CUDA virtual memory management in this build")]
    UnsupportedDevice,

    /// An error of Candle.
    #[error("Candle error: {0}")]
    CandleError(#[source] candle_core::Error),

    /// Memory was to be reserved for a cache before it had tokens. New in 0.2.0.
    #[error("the shape of tokens in the cache of layer {layer} is not known yet")]
    UnknownShape {
        /// The layer, counted from 0.
        layer: usize,
    },

    /// A sequence in one range was asked for the cache of a layer that it has not. New in 0.2.0.
    #[error("there is no layer {layer}: the sequence was made for {layers} layers in one range")]
    UnknownLayer {
        /// The layer, counted from 0.
        layer: usize,
        /// The number of layers.
        layers: usize,
    },

    /// An option of an attention has a value that it cannot have. New in 0.2.0.
    #[error("the {option} of an attention cannot be {value}")]
    InvalidAttention {
        /// The option.
        option: &'static str,
        /// Its value.
        value: f32,
    },

    /// A length is more than the memory of K and V has room for. New in 0.2.0.
    #[error("sequence {sequence} has {length} tokens, but room for {capacity}")]
    LengthBeyondCapacity {
        /// The sequence, counted from 0.
        sequence: usize,
        /// Its length in tokens.
        length: usize,
        /// The most tokens that it can have.
        capacity: usize,
    },

    /// A paged cache, or a write behind the last tokens, has no lengths. New in 0.2.0.
    #[error("the lengths of the sequences are missing: set them with `KvBatch::lengths`")]
    MissingLengths,

    /// A token was to be written to a row that its sequence does not have. New in 0.2.0.
    #[error(
        "token {token} was to be written to row {row} of sequence {sequence}, which has {capacity}"
    )]
    RowBeyondCapacity {
        /// The token, counted from 0.
        token: usize,
        /// Its sequence, counted from 0.
        sequence: usize,
        /// The row.
        row: usize,
        /// The rows of the sequence.
        capacity: usize,
    },

    /// A sequence was named that the batch does not have. New in 0.2.0.
    #[error("there is no sequence {sequence}: the batch has {batch}")]
    UnknownSequence {
        /// The sequence, counted from 0.
        sequence: usize,
        /// The number of sequences.
        batch: usize,
    },

    /// A rotary embedding has no such position. New in 0.2.0.
    #[error(
        "token {token} is at position {position}, but the rotary table ends at {positions_max}"
    )]
    UnknownPosition {
        /// The token, counted from 0.
        token: usize,
        /// Its position.
        position: usize,
        /// The number of positions in the table.
        positions_max: usize,
    },

    /// A chunk of a prompt without queries, or with more queries than keys. New in 0.2.0.
    #[error("span {span} of a prompt has {queries} queries and {keys} keys")]
    InvalidSpan {
        /// The span, counted from 0.
        span: usize,
        /// Its queries.
        queries: usize,
        /// The keys that its last query sees.
        keys: usize,
    },

    /// The kernels do not support heads of this size. New in 0.2.0.
    #[error(
        "heads of {dim} elements of K and {value_dim} of V in {dtype:?} are not supported: on a \
         GPU both are at most 256 and multiples of 16 bytes"
    )]
    UnsupportedHead {
        /// Elements of a head of K.
        dim: usize,
        /// Elements of a head of V.
        value_dim: usize,
        /// The dtype of K and V.
        dtype: candle_core::DType,
    },

    /// Blocks of a paged cache have a size that attention does not support. New in 0.2.0.
    #[error("blocks of {size} tokens are not supported: a multiple of 16 from 16 to 256 is")]
    UnsupportedBlockSize {
        /// Tokens in a block.
        size: usize,
    },

    /// The caches of a batch differ in their strides. New in 0.2.0.
    #[error("sequence {sequence} has strides {strides:?}, others have {expected:?}")]
    DifferentStrides {
        /// The sequence, counted from 0.
        sequence: usize,
        /// Its strides in elements: from head to head and from token to token of K, then of V.
        strides: Vec<usize>,
        /// The strides of the other sequences.
        expected: Vec<usize>,
    },

    /// A decode step has more query heads than its plan was made for. New in 0.2.0.
    #[error("a decode step of {heads} query heads in all sequences; the plan is for {heads_max}")]
    BeyondPlan {
        /// Query heads of all sequences together.
        heads: usize,
        /// The most that the plan has memory for.
        heads_max: usize,
    },

    /// A decode plan was made for another device or another stream. New in 0.2.0.
    #[error("the decode plan was made for another device or stream")]
    PlanOnAnotherDevice,

    /// This build has no attention kernels for the device. New in 0.2.0.
    #[error(
        "this build has no attention kernels: turn on the feature `attention` of candle-cuda-vmm"
    )]
    NoAttentionKernels,

    /// A step was not captured, or did not run. New in 0.2.0.
    #[error(transparent)]
    Graph(#[from] GraphError),

    /// Weights could not be loaded, or neither sleep nor wake.
    #[error(transparent)]
    Weights(#[from] WeightsError),

    /// No model of this name is registered.
    #[error("model not found: {0}")]
    ModelNotFound(String),

    /// A model of this name is already registered.
    #[error("model already registered: {0}")]
    ModelAlreadyExists(String),

    /// Any other error, as a text.
    #[error("{0}")]
    Other(String),

    /// An error of the core crate for which no other variant exists. New in 0.2.0.
    #[error(transparent)]
    Vmm(cuda_vmm::VmmError),
}

impl VmmError {
    /// Converts an error of the cudarc that Candle uses to a [`CudaError`](Self::CudaError).
    #[cfg(any(feature = "cuda", feature = "__docs"))]
    #[cfg_attr(docsrs, doc(cfg(feature = "cuda")))]
    pub fn from_cuda_result(result: cudarc::driver::result::DriverError) -> Self {
        Self::CudaError(format!("{result:?}"))
    }

    /// Makes a [`CudaError`](Self::CudaError) with the given text.
    pub fn cuda<S: Into<String>>(msg: S) -> Self {
        Self::CudaError(msg.into())
    }

    /// Makes an [`Other`](Self::Other) with the given text.
    pub fn other<S: Into<String>>(msg: S) -> Self {
        Self::Other(msg.into())
    }

    /// Finds the error of this crate inside an error of Candle.
    ///
    /// It looks through [`context`](candle_core::Error::context), [`bt`](candle_core::Error::bt),
    /// added paths, and errors that name it as their source, at any depth.
    ///
    /// ```
    /// use candle_cuda_vmm::{VmmError, cuda_vmm};
    ///
    /// # let error = cuda_vmm::VmmError::OutOfPhysicalMemory {
    /// #     asked_bytes: 2, free_bytes: 1, retiring_bytes: 1,
    /// #     reclaimable_bytes: 0, limit_bytes: 4,
    /// # };
    /// # let error = candle_core::Error::from(VmmError::from(error));
    /// # let forward = || Err::<(), _>(error.context("layer 3"));
    /// let error = forward().unwrap_err();
    /// let cause = VmmError::find(&error).expect("the cache had no memory");
    /// assert!(cause.is_out_of_memory());
    /// assert_eq!(cause.shortage().and_then(|shortage| shortage.limit_bytes), Some(4));
    /// ```
    pub fn find(error: &candle_core::Error) -> Option<&Self> {
        use candle_core::Error;
        match error {
            Error::WithBacktrace { inner, .. }
            | Error::Context { inner, .. }
            | Error::WithPath { inner, .. } => Self::find(inner),
            Error::WrappedContext { wrapped, .. } => Self::find_source(&**wrapped),
            Error::Cuda(inner) => Self::find_source(&**inner),
            _ => None,
        }
    }

    /// Finds the error of this crate in a chain of sources.
    fn find_source<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(error) = error.downcast_ref::<candle_core::Error>() {
                return Self::find(error);
            }
            let shared = || error.downcast_ref::<Arc<Self>>().map(|error| &**error);
            if let Some(found) = error.downcast_ref::<Self>().or_else(shared) {
                return Some(found.cause());
            }
            next = error.source();
        }
        None
    }

    /// Returns the error of this crate inside a `CandleError`, otherwise the error itself.
    fn cause(&self) -> &Self {
        match self {
            Self::CandleError(error) => Self::find(error).unwrap_or(self),
            error => error,
        }
    }

    /// Returns what tells whether a retry helps: of a step that failed, the error of the step.
    fn reason(&self) -> &Self {
        use GraphError::{Capture, Warmup};
        match self.cause() {
            Self::Graph(Capture { source, .. } | Warmup { source, .. }) => source.reason(),
            error => error,
        }
    }

    /// Returns how much memory was missing, if the budget is exhausted.
    pub fn shortage(&self) -> Option<Shortage> {
        match self.reason() {
            Self::OutOfPhysicalMemory {
                requested,
                available,
            } => Some(Shortage {
                requested_bytes: *requested,
                available_bytes: *available,
                retiring_bytes: None,
                reclaimable_bytes: None,
                limit_bytes: None,
            }),
            Self::Vmm(cuda_vmm::VmmError::OutOfPhysicalMemory {
                asked_bytes,
                free_bytes,
                retiring_bytes,
                reclaimable_bytes,
                limit_bytes,
            }) => Some(Shortage {
                requested_bytes: *asked_bytes,
                available_bytes: *free_bytes,
                retiring_bytes: Some(*retiring_bytes),
                reclaimable_bytes: Some(*reclaimable_bytes),
                limit_bytes: Some(*limit_bytes),
            }),
            _ => None,
        }
    }

    /// Returns the driver's own code, if a driver call of this crate failed.
    pub fn driver_code(&self) -> Option<cuda_vmm::sys::CUresult> {
        match self.reason() {
            Self::Vmm(error) => error.driver_code(),
            _ => None,
        }
    }

    /// Returns whether physical memory ran out: the budget's, or the device's.
    pub fn is_out_of_memory(&self) -> bool {
        match self.reason() {
            Self::OutOfPhysicalMemory { .. } => true,
            Self::Vmm(error) => error.is_out_of_memory(),
            _ => false,
        }
    }

    /// Returns whether the same call can succeed later, after memory was freed
    /// ([`shortfall_bytes`](Self::shortfall_bytes)).
    ///
    /// [`OutOfPhysicalMemory`](Self::OutOfPhysicalMemory) has no field for the limit, so this
    /// returns `true` for it even if the request exceeds the limit. Compare `requested` with
    /// `global_stats().physical_limit` before you wait.
    pub fn is_retryable(&self) -> bool {
        match self.reason() {
            Self::OutOfPhysicalMemory { .. } => true,
            Self::Vmm(error) => error.is_retryable(),
            _ => false,
        }
    }

    /// Returns how many bytes must be freed before a retry can succeed; 0 if that is not known.
    pub fn shortfall_bytes(&self) -> usize {
        match self.reason() {
            Self::OutOfPhysicalMemory {
                requested,
                available,
            } => requested.saturating_sub(*available),
            Self::Vmm(error) => error.shortfall_bytes(),
            _ => 0,
        }
    }

    /// Returns whether the same call fails always, whatever happens in between.
    ///
    /// If neither this nor [`is_retryable`](Self::is_retryable) is `true`, the result depends on
    /// what the program does: on bytes that it allocates or frees, and on models. Both are `false`
    /// for errors of which nothing is known: [`CudaError`](Self::CudaError), [`Other`](Self::Other)
    /// and Candle's.
    pub fn is_permanent(&self) -> bool {
        // No wildcard, so that a new variant does not compile until it is listed. Variants of the
        // core return what the core's return.
        match self.reason() {
            Self::Vmm(error) => error.is_permanent(),
            Self::CudaError(_)
            | Self::Other(_)
            | Self::CandleError(_)
            | Self::OutOfPhysicalMemory { .. }
            | Self::OutOfVirtualMemory { .. }
            | Self::AlreadyMapped { .. }
            | Self::NotMapped { .. }
            | Self::ModelNotFound(_)
            | Self::UnknownShape { .. }
            | Self::LengthBeyondCapacity { .. }
            | Self::RowBeyondCapacity { .. }
            | Self::UnknownPosition { .. }
            | Self::UnknownSequence { .. }
            | Self::Weights(_)
            | Self::ModelAlreadyExists(_) => false,
            Self::InvalidOffset { .. }
            | Self::MappingFailed(_)
            | Self::UnmappingFailed(_)
            | Self::InvalidAlignment { .. }
            | Self::InvalidPageSize(_)
            | Self::UnknownLayer { .. }
            | Self::InvalidAttention { .. }
            | Self::MissingLengths
            | Self::InvalidSpan { .. }
            | Self::UnsupportedHead { .. }
            | Self::UnsupportedBlockSize { .. }
            | Self::DifferentStrides { .. }
            | Self::BeyondPlan { .. }
            | Self::PlanOnAnotherDevice
            | Self::NoAttentionKernels
            | Self::Graph(_)
            | Self::UnsupportedDevice => true,
        }
    }

    /// Returns whether the device's context is unusable, so that every later call on it fails too.
    pub fn is_poisoned(&self) -> bool {
        match self.reason() {
            Self::Vmm(error) => error.is_poisoned(),
            _ => false,
        }
    }

    /// Converts an error of the core as 0.1.1 reports it: an exhausted budget becomes
    /// [`OutOfPhysicalMemory`](Self::OutOfPhysicalMemory).
    pub(crate) fn as_in_0_1_1(error: cuda_vmm::VmmError) -> Self {
        match Self::from(error) {
            Self::Vmm(cuda_vmm::VmmError::OutOfPhysicalMemory {
                asked_bytes,
                free_bytes,
                ..
            }) => Self::OutOfPhysicalMemory {
                requested: asked_bytes,
                available: free_bytes,
            },
            error => error,
        }
    }
}

/// How much memory was missing when a budget was exhausted, in bytes; see [`VmmError::shortage`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Shortage {
    /// Bytes that the request still needed.
    pub requested_bytes: usize,
    /// Bytes that were free.
    pub available_bytes: usize,
    /// Freed bytes that become available once the device has finished with them. Like the fields
    /// below, `None` for the pools of 0.1.1.
    pub retiring_bytes: Option<usize>,
    /// Bytes that other users of the budget hold and do not use.
    pub reclaimable_bytes: Option<usize>,
    /// The most bytes that the caller may ever hold.
    pub limit_bytes: Option<usize>,
}

impl From<cuda_vmm::VmmError> for VmmError {
    fn from(error: cuda_vmm::VmmError) -> Self {
        use cuda_vmm::VmmError as Core;
        match error {
            Core::OutOfVirtualMemory {
                asked_bytes,
                largest_free_bytes,
            } => Self::OutOfVirtualMemory {
                requested: asked_bytes,
                available: largest_free_bytes,
            },
            Core::OutOfRange {
                offset,
                bytes,
                capacity_bytes,
            } => Self::InvalidOffset {
                offset,
                size: bytes,
                capacity: capacity_bytes,
            },
            Core::Overflow { offset, bytes } => Self::InvalidOffset {
                offset,
                size: bytes,
                capacity: usize::MAX,
            },
            Core::Misaligned {
                value, required, ..
            } => Self::InvalidAlignment {
                actual: value,
                required,
            },
            Core::AlreadyMapped { offset, bytes } => Self::AlreadyMapped {
                offset,
                size: bytes,
            },
            Core::NotMapped { offset, bytes } => Self::NotMapped {
                offset,
                size: bytes,
            },
            Core::InvalidPageSize { page_bytes, .. } => Self::InvalidPageSize(page_bytes),
            Core::UnsupportedDevice { .. } => Self::UnsupportedDevice,
            Core::ModelNotFound { model } => Self::ModelNotFound(model),
            Core::ModelAlreadyRegistered { model } => Self::ModelAlreadyExists(model),
            error => Self::Vmm(error),
        }
    }
}

/// Unwraps an error of this crate that was converted to an error of Candle.
///
/// If context was added in between, the result is [`CandleError`](VmmError::CandleError); use
/// [`VmmError::find`].
impl From<candle_core::Error> for VmmError {
    fn from(error: candle_core::Error) -> Self {
        match error {
            candle_core::Error::WrappedContext { wrapped, context } => {
                match wrapped.downcast::<Self>() {
                    Ok(error) => *error,
                    Err(wrapped) => {
                        Self::CandleError(candle_core::Error::WrappedContext { wrapped, context })
                    }
                }
            }
            error => Self::CandleError(error),
        }
    }
}

/// Lets a function that returns Candle's `Result` use `?` on this crate's errors.
///
/// An error that came from Candle is returned unchanged. Any other is wrapped, and
/// [`VmmError::find`] finds it.
impl From<VmmError> for candle_core::Error {
    fn from(error: VmmError) -> Self {
        match error {
            VmmError::CandleError(error) => error,
            error => Self::WrappedContext {
                context: error.to_string(),
                wrapped: Box::new(error),
            },
        }
    }
}
