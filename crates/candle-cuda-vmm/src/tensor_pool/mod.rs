//! The pool that tensors and caches take their memory from.

mod memory;
mod options;

#[cfg(feature = "cuda")]
pub(crate) use memory::DeviceMemory;
pub(crate) use memory::{Memory, PoolMemory};
pub use options::TensorPoolOptions;

use crate::device::core_device;
use crate::error::Result;
use candle_core::Device;
use cuda_vmm::{Account, Engine, Stream};
use std::fmt;
use std::sync::Arc;

/// A memory pool on one device, with one budget, for tensors and caches that grow in place. Cloning
/// is cheap.
///
/// Its memory is charged to an [`Account`]: one of its own, or that of a model of a
/// [`SharedMemoryPool`](crate::SharedMemoryPool), whose models share one limit.
///
/// On a CUDA device each tensor has its own range of addresses, and memory behind the part in use.
/// The pool lives until its last tensor is dropped.
///
/// # On a CPU device
/// It needs the feature `simulator`. Tensors are plain Candle tensors, which move when they grow;
/// results are the same. Each has a range on the simulated device too, and the pool's engine counts
/// the memory there, page by page, as it does on a GPU. So limits, refusals and statistics are
/// those of a GPU, and admission and pressure can be tested without one. Host memory is not
/// counted.
///
/// One thing differs: Candle does not tell when a view on the CPU is dropped. So a view holds no
/// page, and freed pages leave the engine at once.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_cuda_vmm::TensorPool;
///
/// # #[cfg(not(feature = "simulator"))]
/// # fn main() {}
/// # #[cfg(feature = "simulator")]
/// # fn main() -> candle_cuda_vmm::Result<()> {
/// let pool = TensorPool::new(&Device::Cpu)?; // or `Device::new_cuda(0)?`
/// let mut cache = pool.kv_cache(2, 4096); // as `candle_nn::kv_cache::KvCache::new(2, 4096)`
/// let token = Tensor::ones((1, 8, 1, 64), DType::F32, &Device::Cpu)?;
/// let (k, _v) = cache.append(&token, &token)?;
/// assert_eq!(k.dims(), [1, 8, 1, 64]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct TensorPool(Arc<TensorPoolInner>);

#[derive(Debug)]
pub(crate) struct TensorPoolInner {
    pub(crate) device: Device,
    pub(crate) options: TensorPoolOptions,
    pub(crate) memory: Memory,
    /// Whether nothing else is on its engine.
    is_alone: bool,
}

impl TensorPool {
    /// Creates a pool with the default options.
    ///
    /// # Errors
    /// As [`with_options`](Self::with_options).
    pub fn new(device: &Device) -> Result<Self> {
        Self::with_options(device, TensorPoolOptions::new())
    }

    /// Creates a pool with the given options.
    ///
    /// # Errors
    /// - [`UnsupportedDevice`](crate::VmmError::UnsupportedDevice) unless the device is a CPU, with
    ///   the feature `simulator`, or a GPU with virtual memory management, with the feature `cuda`.
    /// - [`InvalidPageSize`](crate::VmmError::InvalidPageSize) unless the page size is a power of
    ///   two and at least the device's granularity.
    /// - [`Vmm`](crate::VmmError::Vmm) with `ZeroSize` if the limit or the reservation is 0, and
    ///   with `QuotaUnsatisfiable` if the watermarks or the headroom cannot hold.
    /// - Any error of [`core_device`].
    pub fn with_options(device: &Device, options: TensorPoolOptions) -> Result<Self> {
        options.engine.check()?;
        Self::make(device, None, options)
    }

    /// Creates a pool whose memory is charged to an account, together with all else that is: other
    /// pools, ranges, block tables. The account's engine limits it, so the engine options among
    /// `options` are not used.
    ///
    /// A model of a [`SharedMemoryPool`](crate::SharedMemoryPool) gets its pool from
    /// [`SharedMemoryPool::tensor_pool`](crate::SharedMemoryPool::tensor_pool).
    ///
    /// # Errors
    /// As [`with_options`](Self::with_options), and [`Vmm`](crate::VmmError::Vmm) with
    /// `WrongDevice` or `WrongDriver` if the account is of another device, and with `Closed` if it
    /// is closed.
    pub fn on_account(
        device: &Device,
        account: &Account,
        options: TensorPoolOptions,
    ) -> Result<Self> {
        account.quota()?;
        Self::make(device, Some(account), options)
    }

    fn make(
        device: &Device,
        account: Option<&Account>,
        options: TensorPoolOptions,
    ) -> Result<Self> {
        if options.reservation_bytes == 0 {
            return Err(cuda_vmm::VmmError::ZeroSize {
                what: "reservation",
            }
            .into());
        }
        let core = core_device(device)?;
        if let Some(account) = account {
            core.expect_same(account.engine().device())?;
        }
        let memory = match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(cuda) => {
                let stream = crate::lease::core_stream(&core, &cuda.cuda_stream());
                Memory::Device(Arc::new(DeviceMemory {
                    common: PoolMemory::new(&core, account, stream, &options)?,
                    leases: crate::lease::Leases::new(cuda, core.driver()),
                    append: crate::append::Append::new(cuda),
                }))
            }
            _ => {
                let stream = Stream::new(&core)?;
                Memory::Host(Arc::new(PoolMemory::new(&core, account, stream, &options)?))
            }
        };
        Ok(Self(Arc::new(TensorPoolInner {
            device: device.clone(),
            options,
            memory,
            is_alone: account.is_none(),
        })))
    }

    pub(crate) fn inner(&self) -> &TensorPoolInner {
        &self.0
    }

    /// The pool's device.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// The account that all of the pool's memory is charged to: what it may hold, what it owes, how
    /// much is available.
    pub fn account(&self) -> &Account {
        self.0.memory.common().account()
    }

    /// The engine behind the pool, with its statistics. On a CPU device it is on the simulated
    /// device.
    pub fn engine(&self) -> &Engine {
        self.account().engine()
    }

    /// Bytes of device memory that are held for the pool's account: by the pool, and by all else
    /// that is charged to the account.
    ///
    /// That includes freed memory that is still mapped, memory that is mapped ahead and memory that
    /// the device may still use.
    pub fn committed_bytes(&self) -> usize {
        self.account().committed_bytes()
    }

    /// Returns unused memory of the account to the driver, and returns how many bytes that were. A
    /// pool that is alone on its engine also empties the engine's cache.
    ///
    /// # Errors
    /// As [`Engine::trim`] and [`Account::give_back`].
    pub fn trim(&self) -> Result<usize> {
        match self.0.is_alone {
            true => Ok(self.engine().trim()?),
            false => Ok(self.account().give_back()?),
        }
    }
}

/// Prints the numbers of the engine if nothing else is on it, otherwise those of the account.
impl fmt::Display for TensorPool {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.is_alone {
            true => self.engine().stats().fmt(formatter),
            false => self.account().stats().fmt(formatter),
        }
    }
}
