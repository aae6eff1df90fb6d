//! Where tensors that grow get their memory: one budget on one Candle device.

use crate::error::{Result, VmmError};
use crate::{ElasticBlocks, ElasticKvCache, ElasticTensor};
use candle_core::{DType, Device, Shape};
use cuda_vmm::{Engine, EngineOptions};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How a [`TensorPool`] is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct TensorPoolOptions {
    /// The engine behind it: the limit, what stays parked, the largest chunk. On a CPU device only the limit counts; the
    /// others are checked.
    pub engine: EngineOptions,
    /// The page in bytes; the device's granularity where none is given.
    pub page_bytes: Option<usize>,
    /// Addresses that each tensor reserves, in bytes, and so how large it can get. They cost no memory.
    pub reservation_bytes: usize,
    /// How much memory in bytes is made ahead of each tensor's end, so that it grows without a driver call;
    /// [`cuda_vmm::PoolOptions::ahead_bytes_max`].
    pub ahead_bytes_max: usize,
    /// Whether an append to a KV cache answers contiguous copies of all tokens instead of views; see
    /// [`contiguous_answers`](Self::contiguous_answers).
    pub contiguous_answers: bool,
}

impl TensorPoolOptions {
    /// The defaults: the device's memory as the limit, the smallest page, 16 GiB of addresses for each tensor, nothing made
    /// ahead.
    pub const fn new() -> Self {
        Self {
            engine: EngineOptions::new(),
            page_bytes: None,
            reservation_bytes: 16 << 30,
            ahead_bytes_max: 0,
            contiguous_answers: false,
        }
    }

    /// With these options of the engine.
    pub const fn engine(mut self, engine: EngineOptions) -> Self {
        self.engine = engine;
        self
    }

    /// With pages of so many bytes.
    pub const fn page_bytes(mut self, bytes: usize) -> Self {
        self.page_bytes = Some(bytes);
        self
    }

    /// With so many bytes of addresses for each tensor.
    pub const fn reservation_bytes(mut self, bytes: usize) -> Self {
        self.reservation_bytes = bytes;
        self
    }

    /// With memory made ahead of each tensor's end, up to this many bytes.
    pub const fn ahead_bytes_max(mut self, bytes: usize) -> Self {
        self.ahead_bytes_max = bytes;
        self
    }

    /// With appends to KV caches that answer contiguous copies of all tokens instead of views of token-major memory.
    ///
    /// That is for models which repeat K and V for each group of heads as Candle's do (`repeat_kv`): of a contiguous tensor
    /// Candle does it by plain copies, of a transposed view element by element, which takes longer than copying first. The
    /// copies are memory of Candle's, for as long as the model keeps them. [`gqa`](crate::attention::gqa) needs none.
    pub const fn contiguous_answers(mut self, contiguous: bool) -> Self {
        self.contiguous_answers = contiguous;
        self
    }
}

impl Default for TensorPoolOptions {
    fn default() -> Self {
        Self::new()
    }
}

/// Memory for tensors and caches that grow where they stand, on one device and under one budget; a cheap clone.
///
/// On a CUDA device each of them has a range of addresses of its own, backed where it is in use. On a CPU device they are
/// plain Candle tensors, which move when they grow; results are the same. It lives until the last tensor of it is gone.
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
pub struct TensorPool(Arc<Inner>);

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) device: Device,
    pub(crate) options: TensorPoolOptions,
    pub(crate) memory: Memory,
}

/// Where the memory comes from.
#[derive(Debug)]
pub(crate) enum Memory {
    /// Candle's own tensors on the CPU, counted.
    Host(Arc<HostBudget>),
    /// Ranges on an engine.
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

/// Host memory that tensors hold, against a limit.
#[derive(Debug)]
pub(crate) struct HostBudget {
    used_bytes: AtomicUsize,
    limit_bytes: usize,
}

impl HostBudget {
    /// Takes so many bytes, if they are left.
    pub(crate) fn take(&self, bytes: usize) -> Result<()> {
        let take = |used: usize| {
            let used = used.checked_add(bytes)?;
            (used <= self.limit_bytes).then_some(used)
        };
        let relaxed = Ordering::Relaxed;
        match self.used_bytes.fetch_update(relaxed, relaxed, take) {
            Ok(_) => Ok(()),
            Err(used) => Err(self.shortage(bytes, self.limit_bytes - used)),
        }
    }

    /// So many bytes are not to be had: the budget has no more than `free_bytes`, or the host none.
    pub(crate) fn shortage(&self, asked_bytes: usize, free_bytes: usize) -> VmmError {
        VmmError::Vmm(cuda_vmm::VmmError::OutOfPhysicalMemory {
            asked_bytes,
            free_bytes,
            retiring_bytes: 0,
            reclaimable_bytes: 0,
            // No allocation of the host is larger.
            limit_bytes: self.limit_bytes.min(isize::MAX as usize),
        })
    }

    pub(crate) fn give_back(&self, bytes: usize) {
        self.used_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// The granularity of the simulated device that stands for a CPU.
const HOST_GRANULARITY_BYTES: usize = 2 << 20;

/// The page that was asked for, or the device's granularity.
fn check_page(page_bytes: Option<usize>, granularity_bytes: usize) -> Result<usize> {
    let page_bytes = page_bytes.unwrap_or(granularity_bytes);
    if !page_bytes.is_power_of_two() || page_bytes < granularity_bytes {
        return Err(VmmError::InvalidPageSize(page_bytes));
    }
    Ok(page_bytes)
}

impl TensorPool {
    /// A pool with the default options.
    ///
    /// # Errors
    /// As [`with_options`](Self::with_options).
    pub fn new(device: &Device) -> Result<Self> {
        Self::with_options(device, TensorPoolOptions::new())
    }

    /// A pool as the options say.
    ///
    /// # Errors
    /// - [`UnsupportedDevice`](VmmError::UnsupportedDevice) for a device that is neither a CPU nor, with the feature
    ///   `cuda`, a GPU with virtual memory management.
    /// - [`InvalidPageSize`](VmmError::InvalidPageSize) unless the page is a power of two and at least the
    ///   device's granularity.
    /// - [`Vmm`](VmmError::Vmm) with `ZeroSize` for a limit or a reservation of nothing, with `QuotaUnsatisfiable` for
    ///   watermarks or a headroom that cannot hold; what [`core_device`](crate::device::core_device) returns for the device.
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
                // Refuses what it refuses for a GPU.
                #[cfg(feature = "simulator")]
                Engine::new(&crate::device::core_device(device)?, options.engine)?;
                Memory::Host(Arc::new(HostBudget {
                    used_bytes: AtomicUsize::new(0),
                    limit_bytes: options.engine.limit_bytes.unwrap_or(usize::MAX),
                }))
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(cuda) => {
                let core = crate::device::core_device(device)?;
                let page_bytes = check_page(options.page_bytes, core.granularity_bytes())?;
                Memory::Device(Arc::new(DeviceMemory {
                    engine: Engine::new(&core, options.engine)?,
                    stream: crate::lease::stream_of(&core, &cuda.cuda_stream()),
                    leases: crate::lease::Leases::new(cuda, core.driver()),
                    append: crate::append::Append::new(cuda),
                    page_bytes,
                    reservation_bytes: options.reservation_bytes,
                    ahead_bytes_max: options.ahead_bytes_max,
                }))
            }
            _ => return Err(VmmError::UnsupportedDevice),
        };
        Ok(Self(Arc::new(Inner {
            device: device.clone(),
            options,
            memory,
        })))
    }

    pub(crate) fn inner(&self) -> &Inner {
        &self.0
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// The engine behind it, with its statistics; none on a CPU device.
    pub fn engine(&self) -> Option<&Engine> {
        match &self.0.memory {
            Memory::Host(_) => None,
            #[cfg(feature = "cuda")]
            Memory::Device(memory) => Some(&memory.engine),
        }
    }

    /// Memory that its tensors hold, in bytes, with what is parked, ahead or on its way back. On a CPU device that is the
    /// size of the buffers that are in use.
    pub fn committed_bytes(&self) -> usize {
        match &self.0.memory {
            Memory::Host(budget) => budget.used_bytes.load(Ordering::Relaxed),
            #[cfg(feature = "cuda")]
            Memory::Device(memory) => memory.engine.stats().committed_bytes,
        }
    }

    /// Gives back what no tensor needs; returns the bytes. Nothing on a CPU device.
    ///
    /// # Errors
    /// As [`Engine::trim`].
    pub fn trim(&self) -> Result<usize> {
        Ok(self.engine().map_or(Ok(0), Engine::trim)?)
    }

    /// A tensor without rows; each of its rows has this shape, and no shape is one number.
    ///
    /// # Errors
    /// As [`ElasticTensor::new`].
    pub fn tensor(&self, row_shape: impl Into<Shape>, dtype: DType) -> Result<ElasticTensor> {
        ElasticTensor::new(self, row_shape, dtype)
    }

    /// The tensors of a paged cache; see [`ElasticBlocks::new`].
    ///
    /// # Errors
    /// As there.
    pub fn blocks<N: Into<String>, S: Into<Shape>>(
        &self,
        num_blocks: usize,
        entries: impl IntoIterator<Item = (N, S, DType)>,
    ) -> Result<ElasticBlocks> {
        ElasticBlocks::new(self, num_blocks, entries)
    }

    /// An empty KV cache whose sequence is dimension `dim`; see [`ElasticKvCache::new`].
    pub fn kv_cache(&self, dim: usize, max_seq_len: usize) -> ElasticKvCache {
        ElasticKvCache::new(self, dim, max_seq_len)
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
