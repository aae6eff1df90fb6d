//! The pool that tensors and caches take their memory from.

mod host_budget;
mod options;

pub(crate) use host_budget::HostBudget;
pub use options::TensorPoolOptions;

use crate::error::{Result, VmmError};
use candle_core::Device;
use cuda_vmm::Engine;
use std::fmt;
use std::sync::Arc;

/// A memory pool on one device, with one budget, for tensors and caches that grow in place. Cloning
/// is cheap.
///
/// On a CUDA device each tensor has its own range of addresses, and memory behind the part in use.
/// On a CPU device tensors are plain Candle tensors, which move when they grow; results are the
/// same. The pool lives until its last tensor is dropped.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_cuda_vmm::TensorPool;
///
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
}

/// The memory behind a pool.
#[derive(Debug)]
pub(crate) enum Memory {
    /// Candle's own tensors on the CPU, charged to a budget.
    Host(Arc<HostBudget>),
    /// Ranges of addresses on an engine.
    #[cfg(feature = "cuda")]
    Device(Arc<DeviceMemory>),
}

#[cfg(feature = "cuda")]
#[derive(Debug)]
pub(crate) struct DeviceMemory {
    pub(crate) engine: Engine,
    pub(crate) stream: cuda_vmm::Stream,
    pub(crate) leases: Arc<crate::lease::Leases>,
    pub(crate) append: crate::append::Append,
    pub(crate) page_bytes: usize,
    pub(crate) reservation_bytes: usize,
    pub(crate) ahead_bytes_max: usize,
}

/// The granularity of the simulated device that stands for a CPU.
const HOST_GRANULARITY_BYTES: usize = 2 << 20;

/// Checks the page size. `None` selects the granularity.
fn check_page(page_bytes: Option<usize>, granularity_bytes: usize) -> Result<usize> {
    let page_bytes = page_bytes.unwrap_or(granularity_bytes);
    cuda_vmm::pool::check_page_bytes(page_bytes, granularity_bytes)?;
    Ok(page_bytes)
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
    /// - [`UnsupportedDevice`](VmmError::UnsupportedDevice) if the device is neither a CPU nor,
    ///   with the feature `cuda`, a GPU with virtual memory management.
    /// - [`InvalidPageSize`](VmmError::InvalidPageSize) unless the page size is a power of two and
    ///   at least the device's granularity.
    /// - [`Vmm`](VmmError::Vmm) with `ZeroSize` if the limit or the reservation is 0, and with
    ///   `QuotaUnsatisfiable` if the watermarks or the headroom cannot hold.
    /// - Any error of [`core_device`](crate::device::core_device).
    pub fn with_options(device: &Device, options: TensorPoolOptions) -> Result<Self> {
        if options.reservation_bytes == 0 {
            return Err(cuda_vmm::VmmError::ZeroSize {
                what: "reservation",
            }
            .into());
        }
        options.engine.check()?;
        let memory = match device {
            Device::Cpu => {
                check_page(options.page_bytes, HOST_GRANULARITY_BYTES)?;
                // An engine checks the options against a device, as on a GPU. It is not used.
                #[cfg(feature = "simulator")]
                Engine::new(&crate::device::core_device(device)?, options.engine)?;
                Memory::Host(Arc::new(HostBudget::new(options.engine.limit_bytes)))
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(cuda) => {
                let core = crate::device::core_device(device)?;
                let page_bytes = check_page(options.page_bytes, core.granularity_bytes())?;
                Memory::Device(Arc::new(DeviceMemory {
                    engine: Engine::new(&core, options.engine)?,
                    stream: crate::lease::core_stream(&core, &cuda.cuda_stream()),
                    leases: crate::lease::Leases::new(cuda, core.driver()),
                    append: crate::append::Append::new(cuda),
                    page_bytes,
                    reservation_bytes: options.reservation_bytes,
                    ahead_bytes_max: options.ahead_bytes_max,
                }))
            }
            _ => return Err(VmmError::UnsupportedDevice),
        };
        Ok(Self(Arc::new(TensorPoolInner {
            device: device.clone(),
            options,
            memory,
        })))
    }

    pub(crate) fn inner(&self) -> &TensorPoolInner {
        &self.0
    }

    /// The pool's device.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// The engine behind the pool, with its statistics; `None` on a CPU device.
    pub fn engine(&self) -> Option<&Engine> {
        match &self.0.memory {
            Memory::Host(_) => None,
            #[cfg(feature = "cuda")]
            Memory::Device(memory) => Some(&memory.engine),
        }
    }

    /// Bytes of memory that the pool holds.
    ///
    /// On a CUDA device that includes freed memory that is still mapped, memory that is mapped
    /// ahead and memory that the device may still use. On a CPU device it is the size of the
    /// buffers in use.
    pub fn committed_bytes(&self) -> usize {
        match &self.0.memory {
            Memory::Host(budget) => budget.used_bytes(),
            #[cfg(feature = "cuda")]
            Memory::Device(memory) => memory.engine.stats().committed_bytes,
        }
    }

    /// Returns unused memory to the driver, and returns how many bytes that were. On a CPU device
    /// it does nothing and returns 0.
    ///
    /// # Errors
    /// As [`Engine::trim`].
    pub fn trim(&self) -> Result<usize> {
        Ok(self.engine().map_or(Ok(0), Engine::trim)?)
    }
}

impl fmt::Display for TensorPool {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.engine() {
            Some(engine) => engine.stats().fmt(formatter),
            None => write!(formatter, "{} bytes of host memory", self.committed_bytes()),
        }
    }
}
