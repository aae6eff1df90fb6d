//! What can go wrong, with the values that went wrong.

mod block;
mod quota;

pub use block::BlockError;
pub use quota::QuotaConflict;

use crate::sys::{self, CUresult, DriverFunction};

/// The environment variable that forbids [`Driver::detect`](crate::Driver::detect) to simulate,
/// unless it is empty or `0`.
#[cfg(feature = "simulator")]
pub const REQUIRE_GPU_VARIABLE: &str = "CUDA_VMM_REQUIRE_GPU";

/// Result of this crate's operations.
pub type Result<T, E = VmmError> = core::result::Result<T, E>;

/// A driver call that failed: which one, and the code it returned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{call} failed with {name} ({code})")]
pub struct DriverError {
    /// The call.
    pub call: DriverFunction,
    /// The driver's code, unchanged; unknown codes stay as they are.
    pub code: CUresult,
    /// The driver's own name for the code, or `unknown error`.
    pub name: String,
}

/// An error of this crate.
///
/// A caller that gets no memory asks whether to try again, and how much must come back first:
///
/// ```
/// # #[cfg(feature = "simulator")] {
/// use cuda_vmm::{Driver, Result, VirtualMemoryPool};
/// # use cuda_vmm::{Engine, EngineOptions};
///
/// /// Allocates; evicts sequences for as long as that helps.
/// fn allocate(
///     pool: &VirtualMemoryPool,
///     (offset, bytes): (usize, usize),
///     mut evict: impl FnMut(usize) -> Result<bool>,
/// ) -> Result<u64> {
///     loop {
///         match pool.allocate(offset, bytes) {
///             // At least this many bytes must come back; 0 if the driver does not say how many.
///             Err(error) if error.is_retryable() && evict(error.shortfall_bytes())? => continue,
///             // Success; or a permanent error (too large); or nothing is left to evict.
///             outcome => return outcome,
///         }
///     }
/// }
///
/// # let device = Driver::detect()?.device(0)?;
/// # let engine = Engine::new(&device, EngineOptions::new().limit_bytes(1 << 30))?;
/// # let pool = VirtualMemoryPool::on_engine(&engine, 64 << 30, 2 << 20)?;
/// // A budget of 1 GiB is full with four sequences.
/// let mut sequences = vec![];
/// for number in 0..4 {
///     pool.allocate(number << 30, 256 << 20)?;
///     sequences.push(number << 30);
/// }
/// allocate(&pool, (4 << 30, 300 << 20), |_bytes| match sequences.pop() {
///     Some(offset) => pool.deallocate(offset, 256 << 20).map(|()| true),
///     None => Ok(false),
/// })?;
/// assert_eq!(sequences.len(), 2);
///
/// let error = pool.allocate(8 << 30, 2 << 30).unwrap_err();
/// assert!(error.is_out_of_memory() && error.is_permanent()); // more than the budget
/// # }
/// # Ok::<(), cuda_vmm::VmmError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VmmError {
    /// A driver call failed. What the operation had done until then was undone.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// No driver could be opened.
    #[error(transparent)]
    Load(#[from] sys::LoadError),
    /// No GPU answers, and `CUDA_VMM_REQUIRE_GPU` forbids to simulate one.
    #[cfg(feature = "simulator")]
    #[error("{REQUIRE_GPU_VARIABLE} is set and there is no GPU: {reason}")]
    GpuRequired {
        /// Why there is none.
        #[source]
        reason: Box<VmmError>,
    },
    /// The simulated driver could not be started.
    #[cfg(feature = "simulator")]
    #[error(transparent)]
    Simulator(#[from] cuda_vmm_sim::SimError),
    /// The device has no virtual memory management.
    #[error("device {ordinal} does not support virtual memory management")]
    UnsupportedDevice {
        /// The device's number.
        ordinal: usize,
    },
    /// There is no device of this number.
    #[error("no device {ordinal}: the driver reports {count}")]
    InvalidDevice {
        /// The number asked for.
        ordinal: usize,
        /// How many devices there are.
        count: usize,
    },
    /// A size that must not be zero is zero.
    #[error("{what} must not be zero")]
    ZeroSize {
        /// What was given as zero.
        what: &'static str,
    },
    /// `offset + bytes` does not fit in an address.
    #[error("offset {offset} plus {bytes} bytes overflows")]
    Overflow {
        /// First byte.
        offset: usize,
        /// Length in bytes.
        bytes: usize,
    },
    /// A value is not a multiple of what the driver requires.
    #[error("{what} {value} is not a multiple of {required}")]
    Misaligned {
        /// What is misaligned.
        what: &'static str,
        /// Its value in bytes.
        value: usize,
        /// What it must be a multiple of, in bytes.
        required: usize,
    },
    /// A page size that is not a power of two, or below the device's granularity.
    #[error(
        "page size {page_bytes} is not a power of two of at least the granularity {granularity_bytes}"
    )]
    InvalidPageSize {
        /// The page size in bytes.
        page_bytes: usize,
        /// The smallest that the device allows, in bytes.
        granularity_bytes: usize,
    },
    /// Bytes outside a range.
    #[error("offset {offset} plus {bytes} bytes exceeds the capacity of {capacity_bytes} bytes")]
    OutOfRange {
        /// First byte.
        offset: usize,
        /// Length in bytes.
        bytes: usize,
        /// Capacity of the range in bytes.
        capacity_bytes: usize,
    },
    /// Some of the bytes are live already.
    #[error("some of the {bytes} bytes at offset {offset} are allocated already")]
    AlreadyMapped {
        /// First byte.
        offset: usize,
        /// Length in bytes.
        bytes: usize,
    },
    /// Some of the bytes are not live.
    #[error("some of the {bytes} bytes at offset {offset} are not allocated")]
    NotMapped {
        /// First byte.
        offset: usize,
        /// Length in bytes.
        bytes: usize,
    },
    /// The budget has no room. Nothing was taken.
    #[error(
        "out of physical memory: {asked_bytes} bytes asked, {free_bytes} free of {limit_bytes}; \
         {retiring_bytes} retiring, {reclaimable_bytes} reclaimable"
    )]
    OutOfPhysicalMemory {
        /// Bytes that the request still needed.
        asked_bytes: usize,
        /// Bytes that the asker could have had at once.
        free_bytes: usize,
        /// Bytes that come back when the device has finished with them.
        retiring_bytes: usize,
        /// Bytes that are held and not in use; see
        /// [`MemoryParts::reclaimable_bytes`](crate::MemoryParts::reclaimable_bytes).
        reclaimable_bytes: usize,
        /// The most that the asker may ever hold, in bytes.
        limit_bytes: usize,
    },
    /// The limit of a [`HostStore`](crate::HostStore) has no room. Nothing was taken.
    #[error(
        "the host store is full: {needed_bytes} bytes needed, {in_use_bytes} in use of {limit_bytes}"
    )]
    HostStoreFull {
        /// Bytes that the request needs, rounded up to whole huge pages.
        needed_bytes: usize,
        /// Bytes that are reserved, in whole huge pages.
        in_use_bytes: usize,
        /// The limit in bytes.
        limit_bytes: usize,
    },
    /// The operating system refused host memory.
    #[error("{call} of {bytes} bytes of host memory failed: {reason}")]
    HostMemory {
        /// The system call.
        call: &'static str,
        /// Bytes that were asked for.
        bytes: usize,
        /// The system's own words.
        reason: Box<str>,
    },
    /// No run of unused addresses is long enough.
    #[error(
        "out of address space: {asked_bytes} bytes asked, the largest unused run has {largest_free_bytes}"
    )]
    OutOfVirtualMemory {
        /// Bytes asked for.
        asked_bytes: usize,
        /// The largest unused run in bytes.
        largest_free_bytes: usize,
    },
    /// Guarantees, ceilings or limits that cannot hold together.
    #[error("{what}: {asked_bytes} bytes asked, at most {available_bytes} possible")]
    QuotaUnsatisfiable {
        /// Which of them.
        what: QuotaConflict,
        /// What was asked for, in bytes.
        asked_bytes: usize,
        /// The most that could be granted, in bytes.
        available_bytes: usize,
    },
    /// The bytes lie in memory that the driver failed to unmap, or, when it was compacted, to map
    /// again. It is retried, and until then neither handed out nor taken back.
    #[error("the {bytes} bytes at offset {offset} touch quarantined memory")]
    Quarantined {
        /// First byte.
        offset: usize,
        /// Length in bytes.
        bytes: usize,
    },
    /// The bytes were freed, and something outside still uses them; see
    /// [`VirtualMemoryPool::lease`](crate::VirtualMemoryPool::lease).
    #[error("some of the {bytes} bytes at offset {offset} are leased")]
    Leased {
        /// First byte.
        offset: usize,
        /// Length in bytes.
        bytes: usize,
    },
    /// The bytes lie in a chunk that other ranges map too, so to use them anew would change what
    /// those read; see
    /// [`VirtualMemoryPool::make_private`](crate::VirtualMemoryPool::make_private).
    #[error("some of the {bytes} bytes at offset {offset} lie in memory that is shared")]
    Shared {
        /// First byte.
        offset: usize,
        /// Length in bytes.
        bytes: usize,
    },
    /// Shared memory behind the bytes cannot be replaced now by memory of the range's own.
    #[error("the shared memory behind the {bytes} bytes at offset {offset} is kept by {by}")]
    KeptShared {
        /// First byte.
        offset: usize,
        /// Length in bytes.
        bytes: usize,
        /// What keeps it: a lease, a pin or a capture.
        by: &'static str,
    },
    /// The range is asleep, or a thread is putting it to sleep or waking it; see
    /// [`VirtualMemoryPool::sleep`](crate::VirtualMemoryPool::sleep).
    #[error("the range is asleep{}, with {asleep_bytes} bytes", if *is_changing { " or about to be" } else { "" })]
    Asleep {
        /// Memory that it gave up and has when it wakes, in bytes.
        asleep_bytes: usize,
        /// Whether a thread puts it to sleep or wakes it now.
        is_changing: bool,
    },
    /// A range was to be woken that is awake.
    #[error("the range is awake, with {live_bytes} live bytes")]
    Awake {
        /// Its live bytes.
        live_bytes: usize,
    },
    /// A range cannot be put to sleep now. Nothing was changed.
    #[error("the {bytes} bytes at offset {offset} are kept awake by {by}")]
    KeptAwake {
        /// First byte.
        offset: usize,
        /// Length in bytes.
        bytes: usize,
        /// What keeps them: a lease, a pin, a capture, queued work, shared memory, or work of
        /// another thread.
        by: &'static str,
    },
    /// Two ranges that must have pages of one size have pages of two.
    #[error("expected pages of {expected_bytes} bytes, found pages of {found_bytes} bytes")]
    WrongPageSize {
        /// The page needed, in bytes.
        expected_bytes: usize,
        /// The page of the range given, in bytes.
        found_bytes: usize,
    },
    /// Memory of a range was to be shared that has
    /// [one handle behind each allocation](crate::PoolOptions::single_handle).
    #[error("a range with a single handle behind each allocation shares no memory")]
    SingleHandle,
    /// No model of this name is registered.
    #[error("no model named {model:?}")]
    ModelNotFound {
        /// The name.
        model: String,
    },
    /// A model of this name is registered already.
    #[error("a model named {model:?} is registered already")]
    ModelAlreadyRegistered {
        /// The name.
        model: String,
    },
    /// Memory of several accounts was asked for as if it were of one.
    #[error("expected memory of the account {expected:?}, found memory of {found:?}")]
    ForeignAccount {
        /// The account that was asked.
        expected: Box<str>,
        /// The account that the memory is of.
        found: Box<str>,
    },
    /// Two things that must belong to one device belong to two.
    #[error("expected device {expected}, found device {found}")]
    WrongDevice {
        /// The device needed.
        expected: usize,
        /// The device given.
        found: usize,
    },
    /// Two things that must belong to one driver belong to two.
    #[error("the objects belong to different drivers")]
    WrongDriver,
    /// Blocks of a paged cache cannot be had as asked.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The range was closed.
    #[error("the range or its account is closed")]
    Closed,
    /// This process was forked from the one that opened the driver, which CUDA does not allow.
    #[error("the driver was opened before fork; it cannot be used in the child")]
    Forked,
    /// The operating system refused to duplicate a file descriptor.
    #[error("file descriptor {descriptor} could not be duplicated: {reason}")]
    Descriptor {
        /// The descriptor.
        descriptor: i32,
        /// The system's own words.
        reason: String,
    },
}

impl VmmError {
    /// The driver's code, if a driver call failed.
    pub fn driver_code(&self) -> Option<CUresult> {
        match self {
            Self::Driver(error) => Some(error.code),
            _ => None,
        }
    }

    /// Whether no driver library is found, or no device.
    #[cfg(feature = "simulator")]
    pub(crate) fn is_no_gpu(&self) -> bool {
        match self {
            Self::Load(error) => matches!(
                error,
                sys::LoadError::NotFound { .. } | sys::LoadError::Unsupported
            ),
            Self::InvalidDevice { count, .. } => *count == 0,
            error => error.driver_code() == Some(sys::CUDA_ERROR_NO_DEVICE),
        }
    }

    /// Whether memory ran out: the budget's, or the device's.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Self::OutOfPhysicalMemory { .. })
            || self.driver_code() == Some(sys::CUDA_ERROR_OUT_OF_MEMORY)
    }

    /// Whether the same call can succeed later with the same options and quotas: when memory is
    /// back that the device still uses, that others hold or are guaranteed, or, at the caller's own
    /// ceiling, that the caller holds ([`shortfall_bytes`](Self::shortfall_bytes)). A request above
    /// the pool's limit or the caller's own ceiling is never retryable.
    ///
    /// Every error is one of three kinds:
    ///
    /// | kind | errors |
    /// |---|---|
    /// | later | [`OutOfPhysicalMemory`](Self::OutOfPhysicalMemory) of at most its limit; [`Quarantined`](Self::Quarantined); [`Driver`](Self::Driver) with `CUDA_ERROR_OUT_OF_MEMORY`, except for addresses, and with `CUDA_ERROR_NOT_READY` from `cuMemSetAccess` |
    /// | never | `OutOfPhysicalMemory` and [`HostStoreFull`](Self::HostStoreFull) of more than the limit; `Driver` if [the context is beyond use](Self::is_poisoned); [`QuotaUnsatisfiable`](Self::QuotaUnsatisfiable) if two values exclude each other, such as a guarantee and the limit; [`Block`](Self::Block) if no block or plan is such; [`Closed`](Self::Closed), [`Forked`](Self::Forked), and all that says that an argument, a device or the installation is wrong |
    /// | depends on what the program does | all others: on bytes or tensors that it frees, on models and quotas, on descriptors, on host memory |
    ///
    /// The driver does not say how much memory it lacks, so what is larger than the whole device is
    /// later too.
    pub fn is_retryable(&self) -> bool {
        self.prospect() == Prospect::Later
    }

    /// How many bytes must come back before a later try can succeed; 0 if that is not known.
    pub fn shortfall_bytes(&self) -> usize {
        match self {
            Self::OutOfPhysicalMemory {
                asked_bytes,
                free_bytes,
                ..
            } if self.is_retryable() => asked_bytes.saturating_sub(*free_bytes),
            _ => 0,
        }
    }

    /// Whether the same call fails for good, whatever others do meanwhile, as long as the options
    /// and quotas of the caller stay as they are. A request that would fit if another model left,
    /// with its guarantee, is not permanent. The table is at [`is_retryable`](Self::is_retryable).
    /// An error that is neither depends on what the program does.
    pub fn is_permanent(&self) -> bool {
        self.prospect() == Prospect::Never
    }

    /// What becomes of the same call if it is made again. Without a wildcard, so that each new
    /// error is given a thought.
    fn prospect(&self) -> Prospect {
        match self {
            Self::OutOfPhysicalMemory {
                asked_bytes,
                limit_bytes,
                ..
            } => match asked_bytes > limit_bytes {
                true => Prospect::Never,
                false => Prospect::Later,
            },
            Self::HostStoreFull {
                needed_bytes,
                limit_bytes,
                ..
            } => match needed_bytes > limit_bytes {
                true => Prospect::Never,
                false => Prospect::Depends,
            },
            Self::Driver(_) if self.is_poisoned() => Prospect::Never,
            // The driver returns the same code if addresses run out; memory does not help then.
            Self::Driver(error) => match (error.code, error.call) {
                (sys::CUDA_ERROR_OUT_OF_MEMORY, DriverFunction::cuMemAddressReserve) => {
                    Prospect::Depends
                }
                (sys::CUDA_ERROR_OUT_OF_MEMORY, _)
                | (sys::CUDA_ERROR_NOT_READY, DriverFunction::cuMemSetAccess) => Prospect::Later,
                _ => Prospect::Depends,
            },
            Self::Quarantined { .. } => Prospect::Later,
            // What others hold and are guaranteed is in its way. All others are two values that
            // exclude each other.
            Self::QuotaUnsatisfiable { what, .. } => match what {
                QuotaConflict::Guarantee => Prospect::Depends,
                QuotaConflict::GuaranteeAboveCeiling
                | QuotaConflict::GuaranteeAboveLimit
                | QuotaConflict::LimitBelowGuarantees
                | QuotaConflict::Headroom
                | QuotaConflict::ParkBytesMin
                | QuotaConflict::AheadBytesMin => Prospect::Never,
            },
            Self::Block(error) => match error.is_permanent() {
                true => Prospect::Never,
                false => Prospect::Depends,
            },
            Self::OutOfVirtualMemory { .. }
            | Self::AlreadyMapped { .. }
            | Self::NotMapped { .. }
            | Self::Leased { .. }
            | Self::Shared { .. }
            | Self::KeptShared { .. }
            | Self::Asleep { .. }
            | Self::Awake { .. }
            | Self::KeptAwake { .. }
            | Self::ModelNotFound { .. }
            | Self::ModelAlreadyRegistered { .. }
            | Self::HostMemory { .. }
            | Self::Descriptor { .. } => Prospect::Depends,
            #[cfg(feature = "simulator")]
            Self::Simulator(
                cuda_vmm_sim::SimError::TooMany { .. }
                | cuda_vmm_sim::SimError::TooManyInterposers { .. },
            ) => Prospect::Depends,
            #[cfg(feature = "simulator")]
            Self::Simulator(_) | Self::GpuRequired { .. } => Prospect::Never,
            Self::Load(_)
            | Self::UnsupportedDevice { .. }
            | Self::InvalidDevice { .. }
            | Self::ZeroSize { .. }
            | Self::Overflow { .. }
            | Self::Misaligned { .. }
            | Self::InvalidPageSize { .. }
            | Self::OutOfRange { .. }
            | Self::WrongDevice { .. }
            | Self::ForeignAccount { .. }
            | Self::WrongPageSize { .. }
            | Self::SingleHandle
            | Self::WrongDriver
            | Self::Closed
            | Self::Forked => Prospect::Never,
        }
    }

    /// Whether the device's context is beyond use: every later call on it fails too.
    pub fn is_poisoned(&self) -> bool {
        self.driver_code().is_some_and(|code| {
            matches!(
                code,
                sys::CUDA_ERROR_DEINITIALIZED
                    | sys::CUDA_ERROR_ECC_UNCORRECTABLE
                    | sys::CUDA_ERROR_ILLEGAL_ADDRESS
                    | sys::CUDA_ERROR_LAUNCH_TIMEOUT
                    | sys::CUDA_ERROR_CONTEXT_IS_DESTROYED
                    | sys::CUDA_ERROR_ASSERT
                    | sys::CUDA_ERROR_HARDWARE_STACK_ERROR
                    | sys::CUDA_ERROR_ILLEGAL_INSTRUCTION
                    | sys::CUDA_ERROR_MISALIGNED_ADDRESS
                    | sys::CUDA_ERROR_INVALID_ADDRESS_SPACE
                    | sys::CUDA_ERROR_INVALID_PC
                    | sys::CUDA_ERROR_LAUNCH_FAILED
            )
        })
    }
}

/// What becomes of a call that failed if it is made again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Prospect {
    /// It can succeed by itself.
    Later,
    /// It fails for good.
    Never,
    /// It depends on what the program does meanwhile.
    Depends,
}

/// A close that failed: the error, and the object, which still owns what it owned.
///
/// Dropping the object tries once more; what still cannot be given back goes to the device's
/// quarantine.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct CloseError<T> {
    /// Why.
    #[source]
    pub error: VmmError,
    /// What could not be closed.
    pub object: T,
}

impl<T> From<CloseError<T>> for VmmError {
    fn from(failure: CloseError<T>) -> Self {
        failure.error
    }
}
