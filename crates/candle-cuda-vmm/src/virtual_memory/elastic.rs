//! One range of addresses with memory for the part in use.

use super::pages::whole_pages;
use super::stats::MemoryStats;
use crate::device::core_device;
use crate::error::{Result, VmmError};
use candle_core::Device;
use cuda_vmm::PoolStats;

/// A large range of addresses on one device, with memory for the pages in use.
///
/// A new pool reserves addresses only. [`allocate`](Self::allocate) allocates memory for bytes of
/// the caller's choice, and [`deallocate`](Self::deallocate) frees it. Addresses never move. The
/// budget is the device's memory. Dropping the pool frees everything, and waits for the device if
/// it must.
///
/// A KV cache that grows token by token, with one allocation for each:
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
    /// Reserves addresses for `capacity` bytes, rounded up to whole pages of `page_size` bytes
    /// (`cuMemAddressReserve`).
    ///
    /// # Errors
    /// - [`InvalidPageSize`](VmmError::InvalidPageSize) unless `page_size` is a power of two and at
    ///   least the device's allocation granularity, usually 2 MiB.
    /// - [`Vmm`](VmmError::Vmm) with `ZeroSize` if `capacity` is 0.
    /// - [`InvalidOffset`](VmmError::InvalidOffset) if `capacity` cannot be rounded up.
    /// - [`Vmm`](VmmError::Vmm) with the driver's error if it cannot reserve that many addresses.
    /// - Any error of [`core_device`].
    pub fn new(capacity: usize, page_size: usize, device: Device) -> Result<Self> {
        let device = core_device(&device)?;
        let capacity = whole_pages(capacity, page_size);
        let pool = cuda_vmm::VirtualMemoryPool::new(&device, capacity, page_size)?;
        Ok(Self { pool })
    }

    /// Allocates memory for `size` bytes at `offset`, and returns their address. Their content is
    /// undefined.
    ///
    /// Every page that the bytes touch is backed. Two allocations may share a page, so allocations
    /// of any size can follow one another without a gap.
    ///
    /// # Errors
    /// A failed allocation changes nothing.
    /// - [`Vmm`](VmmError::Vmm) with `ZeroSize` if `size` is 0.
    /// - [`InvalidOffset`](VmmError::InvalidOffset) if the bytes lie outside of the capacity, or
    ///   `offset + size` overflows.
    /// - [`AlreadyMapped`](VmmError::AlreadyMapped) if any of the bytes is live.
    /// - [`OutOfPhysicalMemory`](VmmError::OutOfPhysicalMemory) if the device's memory is
    ///   exhausted.
    /// - [`Vmm`](VmmError::Vmm) if a driver call fails.
    pub fn allocate(&mut self, offset: usize, size: usize) -> Result<usize> {
        let address = self
            .pool
            .allocate(offset, size)
            .map_err(|error| self.convert(error))?;
        Ok(address as usize)
    }

    /// Frees `size` live bytes at `offset`: an allocation, a part of one, or several adjacent ones.
    ///
    /// Returns at once. The memory is reused after the device has completed the work that was
    /// launched before.
    ///
    /// # Errors
    /// A failed call frees nothing.
    /// - [`Vmm`](VmmError::Vmm) with `ZeroSize` if `size` is 0.
    /// - [`InvalidOffset`](VmmError::InvalidOffset) if the bytes lie outside of the capacity, or
    ///   `offset + size` overflows.
    /// - [`NotMapped`](VmmError::NotMapped) if any of the bytes is not live.
    pub fn deallocate(&mut self, offset: usize, size: usize) -> Result<()> {
        self.pool
            .deallocate(offset, size)
            .map_err(|error| self.convert(error))
    }

    /// Returns the size of all live pages in bytes.
    ///
    /// Freed memory that stays mapped for reuse is not counted; see
    /// [`detailed_stats`](Self::detailed_stats).
    pub fn physical_memory_usage(&self) -> usize {
        self.pool.physical_memory_usage()
    }

    /// Returns the size of the range in bytes: the requested capacity, rounded up to whole pages.
    pub fn capacity(&self) -> usize {
        self.pool.capacity_bytes()
    }

    /// Returns the address of the range's first byte. It never changes.
    pub fn base_address(&self) -> usize {
        self.pool.base_address() as usize
    }

    /// Returns the page size in bytes.
    pub fn page_size(&self) -> usize {
        self.pool.page_bytes()
    }

    /// Returns whether all of the `size` bytes at `offset` are live; `false` for 0 bytes, and for
    /// bytes outside of the range.
    pub fn is_mapped(&self, offset: usize, size: usize) -> bool {
        self.pool.is_mapped(offset, size)
    }

    /// Frees memory that is mapped and has no live byte: memory kept for reuse, and pages in chunks
    /// that are partly live, whose live pages are moved.
    ///
    /// Addresses and contents of live bytes stay. No work on the range may be launched during the
    /// call, so it takes `&mut self`. If something must move, it waits for the work that was
    /// launched before. Chunks that cannot move stay: while a [`CaptureGuard`](crate::CaptureGuard)
    /// lives, or if the device has no memory for the move. [`detailed_stats`](Self::detailed_stats)
    /// reports them as slack.
    ///
    /// # Errors
    /// [`Vmm`](VmmError::Vmm) if a driver call fails. Live memory is then unchanged, or in
    /// quarantine if it could not be restored ([`cuda_vmm::VirtualMemoryPool::compact`]).
    pub fn compact(&mut self) -> Result<()> {
        // Trims even if the driver refuses to compact.
        let compacted = self.pool.compact();
        self.pool.trim()?;
        compacted?;
        Ok(())
    }

    /// Returns the statistics of 0.1.1.
    pub fn stats(&self) -> MemoryStats {
        self.pool.stats().into()
    }

    /// Returns how many bytes the device holds for this pool, by state. `Display` prints them.
    pub fn detailed_stats(&self) -> PoolStats {
        self.pool.stats()
    }

    /// Returns the pool of [`cuda_vmm`] inside. What it allocates and frees is this pool's.
    pub fn core(&self) -> &cuda_vmm::VirtualMemoryPool {
        &self.pool
    }

    /// Converts an error of the core, and adds the capacity if the core's error lacks it.
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
