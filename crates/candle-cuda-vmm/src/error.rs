//! What can go wrong.
//!
//! The variants of 0.1.1 are all here, with their fields. [`VmmError::Vmm`] is new: it carries an
//! error of the core crate, [`cuda_vmm`], for which 0.1.1 had no variant.

use std::sync::Arc;
use thiserror::Error;

/// Result of this crate's operations.
pub type Result<T> = std::result::Result<T, VmmError>;

/// An error of this crate.
///
/// An error of [`cuda_vmm`] becomes the variant of 0.1.1 that says the same, and
/// [`Vmm`](Self::Vmm) where none does:
///
/// | `cuda_vmm::VmmError` | here |
/// |---|---|
/// | `OutOfVirtualMemory` | [`OutOfVirtualMemory`](Self::OutOfVirtualMemory) |
/// | `OutOfPhysicalMemory` | [`Vmm`](Self::Vmm), with all its numbers, from all that is new in 0.2.0: tensors, caches, blocks. [`OutOfPhysicalMemory`](Self::OutOfPhysicalMemory) from [`VirtualMemoryPool`](crate::VirtualMemoryPool) and [`SharedMemoryPool`](crate::SharedMemoryPool), as in 0.1.1 |
/// | `OutOfRange`, `Overflow` | [`InvalidOffset`](Self::InvalidOffset) |
/// | `Misaligned` | [`InvalidAlignment`](Self::InvalidAlignment) |
/// | `AlreadyMapped`, `NotMapped` | the same |
/// | `InvalidPageSize` | the same |
/// | `UnsupportedDevice` | the same |
/// | `ModelNotFound` | the same |
/// | `ModelAlreadyRegistered` | [`ModelAlreadyExists`](Self::ModelAlreadyExists) |
/// | anything else, a failed driver call above all | [`Vmm`](Self::Vmm) |
#[derive(Debug, Error)]
pub enum VmmError {
    /// A CUDA call failed, in words: what `from_cuda_result` and
    /// [`cuda`](Self::cuda) make. This crate reports its own driver calls as [`Vmm`](Self::Vmm), with
    /// the call and its code.
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

    /// The budget has no room. Nothing was taken. [`shortage`](Self::shortage) says the same of this and of the core's error.
    #[error("out of physical memory: {requested} bytes requested, {available} available")]
    OutOfPhysicalMemory {
        /// Bytes of physical memory that the request still needed.
        requested: usize,
        /// Bytes that could have been had at once.
        available: usize,
    },

    /// Bytes outside a range, or an end that does not fit in an address.
    #[error("invalid offset: {offset} (size: {size}, capacity: {capacity})")]
    InvalidOffset {
        /// First byte.
        offset: usize,
        /// Length in bytes.
        size: usize,
        /// Capacity of the range in bytes; `usize::MAX` where only the overflow is known.
        capacity: usize,
    },

    /// A mapping that cannot be made as asked.
    #[error("mapping failed: {0}")]
    MappingFailed(String),

    /// A mapping that cannot be taken away as asked.
    #[error("unmapping failed: {0}")]
    UnmappingFailed(String),

    /// A value is not aligned as it must be.
    #[error("invalid alignment: {actual}, required: {required}")]
    InvalidAlignment {
        /// The value in bytes.
        actual: usize,
        /// What it must be a multiple of, in bytes; 0 where any power of two would do.
        required: usize,
    },

    /// Some of the bytes are allocated, or mapped, already.
    #[error("range already mapped: offset {offset}, size {size}")]
    AlreadyMapped {
        /// First byte.
        offset: usize,
        /// Length in bytes.
        size: usize,
    },

    /// Some of the bytes are not allocated, or not mapped.
    #[error("range not mapped: offset {offset}, size {size}")]
    NotMapped {
        /// First byte.
        offset: usize,
        /// Length in bytes.
        size: usize,
    },

    /// A page size that is not a power of two, or below the device's granularity.
    #[error(
        "invalid page size: {0} (it must be a power of two, and at least the device's allocation granularity)"
    )]
    InvalidPageSize(usize),

    /// The device has no virtual memory management, or this build serves no device of its kind.
    #[error("the device does not support CUDA virtual memory management in this build")]
    UnsupportedDevice,

    /// An error of Candle.
    #[error("Candle error: {0}")]
    CandleError(#[source] candle_core::Error),

    /// No model of this name is registered.
    #[error("model not found: {0}")]
    ModelNotFound(String),

    /// A model of this name is registered already.
    #[error("model already registered: {0}")]
    ModelAlreadyExists(String),

    /// Anything else, in words.
    #[error("{0}")]
    Other(String),

    /// An error of the core crate that no other variant says. New in 0.2.0.
    #[error(transparent)]
    Vmm(cuda_vmm::VmmError),
}

impl VmmError {
    /// A [`CudaError`](Self::CudaError) from an error of the cudarc that Candle uses.
    #[cfg(any(feature = "cuda", feature = "__docs"))]
    #[cfg_attr(docsrs, doc(cfg(feature = "cuda")))]
    pub fn from_cuda_result(result: cudarc::driver::result::DriverError) -> Self {
        Self::CudaError(format!("{result:?}"))
    }

    /// A [`CudaError`](Self::CudaError) in your own words.
    pub fn cuda<S: Into<String>>(msg: S) -> Self {
        Self::CudaError(msg.into())
    }

    /// An [`Other`](Self::Other) in your own words.
    pub fn other<S: Into<String>>(msg: S) -> Self {
        Self::Other(msg.into())
    }

    /// The error of this crate that an error of Candle holds, however often it was wrapped on its way: by
    /// [`context`](candle_core::Error::context), by [`bt`](candle_core::Error::bt), with a path, or in an error of a model
    /// that names it as its source.
    ///
    /// ```
    /// use candle_cuda_vmm::{VmmError, cuda_vmm};
    ///
    /// # let error = cuda_vmm::VmmError::OutOfPhysicalMemory {
    /// #     asked_bytes: 2, free_bytes: 1, retiring_bytes: 1, reclaimable_bytes: 0, limit_bytes: 4,
    /// # };
    /// # let forward = || Err::<(), _>(candle_core::Error::from(VmmError::from(error)).context("layer 3"));
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

    /// The error of this crate in a chain of sources.
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

    /// The error of this crate that was the cause, if it came back in one of Candle's.
    fn cause(&self) -> &Self {
        match self {
            Self::CandleError(error) => Self::find(error).unwrap_or(self),
            error => error,
        }
    }

    /// What was missing, if memory of the budget ran out.
    pub fn shortage(&self) -> Option<Shortage> {
        match self.cause() {
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

    /// The driver's own code, if a driver call of this crate failed.
    pub fn driver_code(&self) -> Option<cuda_vmm::sys::CUresult> {
        match self.cause() {
            Self::Vmm(error) => error.driver_code(),
            _ => None,
        }
    }

    /// Whether physical memory ran out: the budget's, or the device's.
    pub fn is_out_of_memory(&self) -> bool {
        match self.cause() {
            Self::OutOfPhysicalMemory { .. } => true,
            Self::Vmm(error) => error.is_out_of_memory(),
            _ => false,
        }
    }

    /// Whether the same call can succeed later, when memory is back
    /// ([`later_bytes`](Self::later_bytes)).
    ///
    /// [`OutOfPhysicalMemory`](Self::OutOfPhysicalMemory) has no field for the limit, so this returns
    /// `true` for it even if the request is larger than the limit: compare `requested` with
    /// `global_stats().physical_limit` before you wait.
    pub fn is_later(&self) -> bool {
        match self.cause() {
            Self::OutOfPhysicalMemory { .. } => true,
            Self::Vmm(error) => error.is_later(),
            _ => false,
        }
    }

    /// How many bytes must come back before a later try can succeed; 0 if that is not known.
    pub fn later_bytes(&self) -> usize {
        match self.cause() {
            Self::OutOfPhysicalMemory {
                requested,
                available,
            } => requested.saturating_sub(*available),
            Self::Vmm(error) => error.later_bytes(),
            _ => 0,
        }
    }

    /// Whether the same call fails for good, whatever the program and others do meanwhile.
    ///
    /// An error that is neither this nor [`is_later`](Self::is_later) depends on what the program does: on bytes that it
    /// allocates or frees, and on models. Nothing is known about errors in words ([`CudaError`](Self::CudaError),
    /// [`Other`](Self::Other)) and about Candle's: those are neither.
    pub fn is_never(&self) -> bool {
        // Without a wildcard, so that each new error is given a thought. A variant that the core has too is as there.
        match self.cause() {
            Self::Vmm(error) => error.is_never(),
            Self::CudaError(_)
            | Self::Other(_)
            | Self::CandleError(_)
            | Self::OutOfPhysicalMemory { .. }
            | Self::OutOfVirtualMemory { .. }
            | Self::AlreadyMapped { .. }
            | Self::NotMapped { .. }
            | Self::ModelNotFound(_)
            | Self::ModelAlreadyExists(_) => false,
            Self::InvalidOffset { .. }
            | Self::MappingFailed(_)
            | Self::UnmappingFailed(_)
            | Self::InvalidAlignment { .. }
            | Self::InvalidPageSize(_)
            | Self::UnsupportedDevice => true,
        }
    }

    /// Whether the device's context is beyond use: every later call on it fails too.
    pub fn is_poisoned(&self) -> bool {
        match self.cause() {
            Self::Vmm(error) => error.is_poisoned(),
            _ => false,
        }
    }

    /// As 0.1.1 said it: a budget without room is [`OutOfPhysicalMemory`](Self::OutOfPhysicalMemory).
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

/// What was missing when memory of a budget ran out, in bytes; see [`VmmError::shortage`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Shortage {
    /// What the request still needed.
    pub requested_bytes: usize,
    /// What could have been had at once.
    pub available_bytes: usize,
    /// What comes back when the device has finished with it. Not known from the pools of 0.1.1, as nor is what follows.
    pub retiring_bytes: Option<usize>,
    /// What is held but not in use, which others could give up.
    pub reclaimable_bytes: Option<usize>,
    /// The most that the asker may ever hold.
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

/// An error of this crate that went through Candle comes back as what it was, unless something was said about it on the
/// way; then [`VmmError::find`] has it.
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

/// So that a function that returns Candle's `Result` takes this crate's errors with `?`. An error that came from Candle
/// is that error again; any other is kept whole, and [`VmmError::find`] finds it.
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
