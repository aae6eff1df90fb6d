//! One range of addresses that is backed where it is in use.

use crate::device::core_device;
use crate::error::{Result, VmmError};
use crate::virtual_memory::{MemoryStats, whole_pages};
use candle_core::Device;

/// A large range of addresses on one device, backed with memory page by page, where it is in use.
///
/// Making a pool takes addresses only. [`allocate`](Self::allocate) puts memory behind bytes of the
/// caller's choice, [`deallocate`](Self::deallocate) takes it away, and the addresses stay where they
/// are. The budget is the device's memory. Dropping the pool gives back everything, waiting for the
/// device where it must.
///
/// A KV cache that grows token by token, in one allocation for each:
/// ```
/// # #[cfg(feature = "simulator")] {
/// use candle_cuda_vmm::VirtualMemoryPool;
///
/// let token_bytes = 300_000; // several to a page, and some across two
/// let mut pool = VirtualMemoryPool::new(64 << 30, 2 << 20, candle_core::Device::Cpu)?;
/// for token in 0..100 {
///     let address = pool.allocate(token * token_bytes, token_bytes)?;
///     assert_eq!(address, pool.base_address() + token * token_bytes);
/// }
/// assert_eq!(pool.stats().mapped_pages, (100 * token_bytes).div_ceil(2 << 20));
/// # }
/// # Ok::<(), candle_cuda_vmm::VmmError>(())
/// ```
pub struct VirtualMemoryPool {
    pool: cuda_vmm::VirtualMemoryPool,
}

impl VirtualMemoryPool {
    /// Reserves addresses for `capacity` bytes (rounded up to whole pages) in pages of `page_size` bytes.
    ///
    /// # Errors
    /// - [`InvalidPageSize`](VmmError::InvalidPageSize) unless `page_size` is a power of two and at least
    ///   the device's allocation granularity, 2 MiB as a rule.
    /// - [`Vmm`](VmmError::Vmm) with `ZeroSize` if `capacity` is 0.
    /// - [`InvalidOffset`](VmmError::InvalidOffset) if `capacity` cannot be rounded up, and
    ///   [`Vmm`](VmmError::Vmm) with the driver's answer if it has no room for so many addresses.
    /// - What [`core_device`] returns for the device.
    pub fn new(capacity: usize, page_size: usize, device: Device) -> Result<Self> {
        let device = core_device(&device)?;
        let capacity = whole_pages(capacity, page_size);
        let pool = cuda_vmm::VirtualMemoryPool::new(&device, capacity, page_size)?;
        Ok(Self { pool })
    }

    /// Puts memory behind `size` bytes at `offset`, and returns their address. They become live; what
    /// they contain is not specified.
    ///
    /// Every page that the bytes touch is backed. A page may be shared with neighbours, so allocations of
    /// any size may follow one another without a gap.
    ///
    /// # Errors
    /// A failed allocation changes nothing.
    /// - [`Vmm`](VmmError::Vmm) with `ZeroSize` if `size` is 0.
    /// - [`InvalidOffset`](VmmError::InvalidOffset) if the bytes do not lie within the capacity, or
    ///   `offset + size` overflows.
    /// - [`AlreadyMapped`](VmmError::AlreadyMapped) if any of the bytes is live.
    /// - [`OutOfPhysicalMemory`](VmmError::OutOfPhysicalMemory) if the device's memory does not suffice.
    /// - [`Vmm`](VmmError::Vmm) if a driver call fails.
    pub fn allocate(&mut self, offset: usize, size: usize) -> Result<usize> {
        let address = self
            .pool
            .allocate(offset, size)
            .map_err(|error| self.convert(error))?;
        Ok(address as usize)
    }

    /// Frees `size` live bytes at `offset`: all of an allocation, part of one, or several that adjoin.
    ///
    /// Returns at once. The memory is handed on when the device has finished what was launched before.
    ///
    /// # Errors
    /// A failed call frees nothing.
    /// - [`Vmm`](VmmError::Vmm) with `ZeroSize` if `size` is 0.
    /// - [`InvalidOffset`](VmmError::InvalidOffset) if the bytes do not lie within the capacity, or
    ///   `offset + size` overflows.
    /// - [`NotMapped`](VmmError::NotMapped) if any of the bytes is not live.
    pub fn deallocate(&mut self, offset: usize, size: usize) -> Result<()> {
        self.pool
            .deallocate(offset, size)
            .map_err(|error| self.convert(error))
    }

    /// Bytes of live pages. What stays mapped for the next request is not counted;
    /// [`detailed_stats`](Self::detailed_stats) has it.
    pub fn physical_memory_usage(&self) -> usize {
        self.pool.physical_memory_usage()
    }

    /// Address space in bytes: the capacity asked for, rounded up to whole pages.
    pub fn capacity(&self) -> usize {
        self.pool.capacity_bytes()
    }

    /// Address of the range's first byte. It never changes.
    pub fn base_address(&self) -> usize {
        self.pool.base_address() as usize
    }

    /// Page size in bytes.
    pub fn page_size(&self) -> usize {
        self.pool.page_bytes()
    }

    /// Whether all of the `size` bytes at `offset` are live. `false` for no bytes, and for bytes outside
    /// the range.
    pub fn is_mapped(&self, offset: usize, size: usize) -> bool {
        self.pool.is_mapped(offset, size)
    }

    /// Gives back memory that is mapped and backs no live byte: what is kept for the next request, and pages that are
    /// mapped in one piece with live ones, which are moved.
    ///
    /// Addresses and contents of live bytes stay. No work on the range may be launched during the call, which is why
    /// it takes `&mut self`; work that was launched before is waited for where something is to be moved. While a
    /// [`CaptureGuard`](cuda_vmm::CaptureGuard) lives, and where the device has no room for the move, that memory
    /// stays. [`detailed_stats`](Self::detailed_stats) has it as slack.
    ///
    /// # Errors
    /// [`Vmm`](VmmError::Vmm) if a driver call fails; live memory is as it was, or kept in quarantine if it could not
    /// be put back ([`cuda_vmm::VirtualMemoryPool::compact`]).
    pub fn compact(&mut self) -> Result<()> {
        // Both, whichever the driver refuses.
        let compacted = self.pool.compact();
        self.pool.trim()?;
        compacted?;
        Ok(())
    }

    /// Statistics, as 0.1.1 had them.
    pub fn stats(&self) -> MemoryStats {
        self.pool.stats().into()
    }

    /// Where every byte that the device holds for this pool is; prints well.
    pub fn detailed_stats(&self) -> cuda_vmm::PoolStats {
        self.pool.stats()
    }

    /// The pool of [`cuda_vmm`] inside: what it allocates and frees is this pool's.
    pub fn core(&self) -> &cuda_vmm::VirtualMemoryPool {
        &self.pool
    }

    /// The error of this crate, with the capacity where the core's does not have it.
    fn convert(&self, error: cuda_vmm::VmmError) -> VmmError {
        match VmmError::as_in_0_1_1(error) {
            VmmError::InvalidOffset { offset, size, .. } => VmmError::InvalidOffset {
                offset,
                size,
                capacity: self.capacity(),
            },
            error => error,
        }
    }
}
