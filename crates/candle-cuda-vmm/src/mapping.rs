//! Addresses without memory, and putting memory behind them by hand.
//!
//! The pools of [`virtual_memory`](crate::virtual_memory) do all this for you. Here nothing waits for
//! the device: unmapping memory that a kernel still uses is an illegal access, after which the device's
//! context is beyond use.
//!
//! Everything here belongs to the [default driver](default_driver).
//!
//! # Safety
//! A [`VirtualAddressRange`] owns its addresses, and knows what [`map_memory`] put there, so that it
//! unmaps before it frees. Through an address alone no safe function reaches memory.
#![allow(unsafe_code)]

use crate::cuda_ffi::{self, AccessFlags, DevicePtr};
use crate::device::default_driver;
use crate::error::{Result, VmmError};
use crate::physical_memory::PhysicalMemoryHandle;
use cuda_vmm::{Driver, PerProcess};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A range of reserved addresses (`cuMemAddressReserve`), which costs no memory.
///
/// Dropping unmaps what [`map_memory`] mapped (`cuMemUnmap`) and frees the addresses
/// (`cuMemAddressFree`). What the driver refuses to take back then is tried again when the next range is
/// made.
///
/// ```
/// # #[cfg(all(feature = "simulator", not(feature = "cuda")))] {
/// use candle_cuda_vmm::{AccessFlags, PhysicalMemoryHandle, VirtualAddressRange};
/// use candle_cuda_vmm::{map_memory, set_memory_access, unmap_memory};
///
/// const PAGE: usize = 2 << 20;
/// let range = VirtualAddressRange::new(1 << 30, PAGE)?;
/// let memory = PhysicalMemoryHandle::new(PAGE, &candle_core::Device::Cpu)?;
/// map_memory(&range, 4 * PAGE, &memory, 0, PAGE)?;
/// set_memory_access(&range, 4 * PAGE, PAGE, 0, AccessFlags::ReadWrite)?;
/// println!("memory at {:#x}", range.ptr_at_offset(4 * PAGE)?);
/// unmap_memory(&range, 4 * PAGE, PAGE)?;
/// # }
/// # Ok::<(), candle_cuda_vmm::VmmError>(())
/// ```
#[derive(Debug)]
pub struct VirtualAddressRange {
    ptr: DevicePtr,
    size: usize,
    alignment: usize,
    /// `None` once the addresses are given up, and for raw ones where there is no driver to free them.
    driver: Option<Driver>,
    /// Whether the range came from outside, perhaps with mappings that are not in `mapped`.
    adopted: bool,
    /// What [`map_memory`] put here: offset and size, in bytes.
    mapped: Mutex<BTreeMap<usize, usize>>,
}

/// Ranges that could not be given back when they were dropped.
static REFUSED: PerProcess<Mutex<Vec<VirtualAddressRange>>> = PerProcess::new();

impl VirtualAddressRange {
    /// Reserves `size` bytes of addresses, a multiple of the granularity of device 0, at a multiple of
    /// `alignment`.
    ///
    /// # Errors
    /// - [`Vmm`](VmmError::Vmm) with `ZeroSize` if `size` is 0.
    /// - [`InvalidAlignment`](VmmError::InvalidAlignment) if `alignment` is not a power of two
    ///   (`required` is 0: any would do), or `size` not a multiple of the granularity.
    /// - [`Vmm`](VmmError::Vmm) if the driver has no such run of addresses; what [`default_driver`]
    ///   returns.
    pub fn new(size: usize, alignment: usize) -> Result<Self> {
        if !alignment.is_power_of_two() {
            return Err(VmmError::InvalidAlignment {
                actual: alignment,
                required: 0,
            });
        }
        nonzero(size)?;
        let granularity = cuda_ffi::get_minimum_granularity(0)?;
        multiple(size, granularity)?;
        retry_refused();
        let driver = default_driver()?;
        // SAFETY: the range that is made here owns the addresses and frees them once.
        let ptr = unsafe { cuda_ffi::address_reserve(&driver, size, alignment, 0) }?;
        Ok(Self {
            ptr,
            size,
            alignment,
            driver: Some(driver),
            adopted: false,
            mapped: Mutex::default(),
        })
    }

    /// Takes over addresses that were reserved elsewhere.
    ///
    /// Mappings that are there already are not known to the range: it does not unmap them when dropped,
    /// and cannot be freed before they are gone.
    ///
    /// # Safety
    /// The range is the whole of one reservation of the [default driver](default_driver), owned by
    /// nobody else, of this size and alignment in bytes.
    pub unsafe fn from_raw(ptr: DevicePtr, size: usize, alignment: usize) -> Self {
        Self {
            ptr,
            size,
            alignment,
            driver: default_driver().ok(),
            adopted: true,
            mapped: Mutex::default(),
        }
    }

    /// The first address.
    pub fn base_address(&self) -> usize {
        self.ptr as usize
    }

    /// Size in bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Alignment in bytes that was asked for.
    pub fn alignment(&self) -> usize {
        self.alignment
    }

    /// The first address, as the driver has it.
    pub fn as_ptr(&self) -> DevicePtr {
        self.ptr
    }

    /// The address `offset` bytes from the first.
    ///
    /// # Errors
    /// [`InvalidOffset`](VmmError::InvalidOffset) unless `offset` is less than the size.
    pub fn ptr_at_offset(&self, offset: usize) -> Result<DevicePtr> {
        if offset >= self.size {
            return Err(VmmError::InvalidOffset {
                offset,
                size: 0,
                capacity: self.size,
            });
        }
        Ok(self.ptr + offset as u64)
    }

    /// Gives up ownership: the address and the size in bytes. The caller unmaps what is mapped there and
    /// frees the addresses, with [`mem_address_free`](cuda_ffi::mem_address_free) for one.
    pub fn into_raw(mut self) -> (DevicePtr, usize) {
        self.driver = None;
        (self.ptr, self.size)
    }

    fn driver(&self) -> Result<&Driver> {
        self.driver.as_ref().ok_or(VmmError::UnsupportedDevice)
    }

    /// What is mapped. Fails in a forked process, where the lock may be held for good.
    fn mapped(&self) -> Result<MutexGuard<'_, BTreeMap<usize, usize>>> {
        self.driver()?.check_process()?;
        Ok(self.mapped.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Unmaps what was mapped here and frees the addresses; what failed is still owned.
    fn release(&mut self) -> Result<()> {
        let Some(driver) = &self.driver else {
            return Ok(());
        };
        let mapped = self
            .mapped
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        while let Some((&offset, &size)) = mapped.first_key_value() {
            // SAFETY: this is a whole mapping in our own addresses. Whoever used them in work for the
            // device did so through unsafe calls and had to wait for it.
            unsafe { cuda_ffi::unmap(driver, self.ptr + offset as u64, size) }?;
            mapped.remove(&offset);
        }
        // SAFETY: the range owns the addresses; they are freed here once, and nothing of ours is mapped.
        unsafe { cuda_ffi::address_free(driver, self.ptr, self.size) }
    }
}

impl Drop for VirtualAddressRange {
    fn drop(&mut self) {
        let Err(error) = self.release() else { return };
        if error.is_poisoned() || matches!(error, VmmError::Vmm(cuda_vmm::VmmError::Forked)) {
            return;
        }
        tracing::warn!(address = self.ptr, bytes = self.size, %error, "addresses could not be freed; they will be tried again");
        let refused = Self {
            driver: self.driver.take(),
            mapped: std::mem::take(&mut self.mapped),
            ..*self
        };
        REFUSED
            .get()
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(refused);
    }
}

/// Drops each refused range again; what fails once more comes back into the list.
fn retry_refused() {
    let refused =
        std::mem::take(&mut *REFUSED.get().lock().unwrap_or_else(PoisonError::into_inner));
    drop(refused);
}

/// Maps physical memory into a range (`cuMemMap`). No device has access until
/// [`set_memory_access`].
///
/// The driver maps whole allocations only: `physical_offset` must be 0 and `size` the handle's.
///
/// # Errors
/// Nothing is mapped then.
/// - [`Vmm`](VmmError::Vmm) with `ZeroSize` if `size` is 0; with `WrongDriver` if range and memory
///   belong to different drivers.
/// - [`InvalidOffset`](VmmError::InvalidOffset) if the bytes do not lie within the range, or within the
///   memory, or an end overflows.
/// - [`InvalidAlignment`](VmmError::InvalidAlignment) unless `offset` is a multiple of the granularity.
/// - [`MappingFailed`](VmmError::MappingFailed) for part of the memory.
/// - [`AlreadyMapped`](VmmError::AlreadyMapped) if memory was mapped to any of the bytes.
/// - [`Vmm`](VmmError::Vmm) if the driver call fails.
pub fn map_memory(
    virtual_range: &VirtualAddressRange,
    offset: usize,
    physical_handle: &PhysicalMemoryHandle,
    physical_offset: usize,
    size: usize,
) -> Result<()> {
    within(offset, size, virtual_range.size)?;
    within(physical_offset, size, physical_handle.size())?;
    let driver = virtual_range.driver()?;
    let memory = physical_handle
        .memory()
        .ok_or(VmmError::UnsupportedDevice)?;
    if !driver.is_same(memory.device().driver()) {
        return Err(VmmError::Vmm(cuda_vmm::VmmError::WrongDriver));
    }
    multiple(offset, memory.device().granularity_bytes())?;
    if physical_offset != 0 || size != physical_handle.size() {
        return Err(VmmError::MappingFailed(format!(
            "{size} bytes at offset {physical_offset} are not the whole of an allocation of {} bytes",
            physical_handle.size()
        )));
    }
    let ptr = virtual_range.ptr_at_offset(offset)?;
    // Held over the call, so that the record and the driver agree whoever else maps and unmaps.
    let mut mapped = virtual_range.mapped()?;
    if overlapping(&mapped, offset, size).next().is_some() {
        return Err(VmmError::AlreadyMapped { offset, size });
    }
    // SAFETY: the addresses lie in the range, which unmaps before it frees them, and the handle is alive.
    unsafe { cuda_ffi::map(driver, ptr, size, 0, physical_handle.as_raw()) }?;
    mapped.insert(offset, size);
    Ok(())
}

/// Unmaps whole mappings (`cuMemUnmap`). The bytes may hold gaps. It does not wait for the device.
///
/// # Errors
/// Nothing is unmapped then.
/// - [`Vmm`](VmmError::Vmm) with `ZeroSize` if `size` is 0.
/// - [`InvalidOffset`](VmmError::InvalidOffset) if the bytes do not lie within the range, or the end
///   overflows.
/// - [`NotMapped`](VmmError::NotMapped) if nothing is mapped there.
/// - [`UnmappingFailed`](VmmError::UnmappingFailed) if a mapping lies there in part only.
/// - [`Vmm`](VmmError::Vmm) if the driver call fails.
pub fn unmap_memory(virtual_range: &VirtualAddressRange, offset: usize, size: usize) -> Result<()> {
    within(offset, size, virtual_range.size)?;
    let driver = virtual_range.driver()?;
    let ptr = virtual_range.ptr_at_offset(offset)?;
    let mut mapped = virtual_range.mapped()?;
    let found: Vec<(usize, usize)> = overlapping(&mapped, offset, size).collect();
    if found.is_empty() && !virtual_range.adopted {
        return Err(VmmError::NotMapped { offset, size });
    }
    if let Some((start, length)) = cut(&found, offset, size) {
        return Err(VmmError::UnmappingFailed(format!(
            "{size} bytes at offset {offset} hold only part of the mapping of {length} bytes at offset {start}"
        )));
    }
    // SAFETY: the addresses are the range's own. Whoever used them in work for the device did so through
    // unsafe calls and had to wait for it.
    unsafe { cuda_ffi::unmap(driver, ptr, size) }?;
    for (start, _) in found {
        mapped.remove(&start);
    }
    Ok(())
}

/// Sets what a device may do with whole mappings that adjoin (`cuMemSetAccess`).
///
/// # Errors
/// Access is as it was then.
/// - [`Vmm`](VmmError::Vmm) with `ZeroSize` if `size` is 0.
/// - [`InvalidOffset`](VmmError::InvalidOffset) if the bytes do not lie within the range, or the end
///   overflows.
/// - [`NotMapped`](VmmError::NotMapped) unless memory is mapped to all of the bytes.
/// - [`MappingFailed`](VmmError::MappingFailed) if a mapping lies there in part only.
/// - [`Vmm`](VmmError::Vmm) if the driver call fails, as for a device that is not there.
pub fn set_memory_access(
    virtual_range: &VirtualAddressRange,
    offset: usize,
    size: usize,
    device_ordinal: i32,
    flags: AccessFlags,
) -> Result<()> {
    within(offset, size, virtual_range.size)?;
    let driver = virtual_range.driver()?;
    let ptr = virtual_range.ptr_at_offset(offset)?;
    let mapped = virtual_range.mapped()?;
    if !virtual_range.adopted {
        let found: Vec<(usize, usize)> = overlapping(&mapped, offset, size).collect();
        if let Some((start, length)) = cut(&found, offset, size) {
            return Err(VmmError::MappingFailed(format!(
                "{size} bytes at offset {offset} hold only part of the mapping of {length} bytes at offset {start}"
            )));
        }
        if found.iter().map(|(_, length)| length).sum::<usize>() != size {
            return Err(VmmError::NotMapped { offset, size });
        }
    }
    // SAFETY: the addresses are the range's own. Whoever uses them in work for the device does so
    // through unsafe calls.
    unsafe { cuda_ffi::set_access(driver, ptr, size, device_ordinal, flags) }
}

/// The mappings that share a byte with `size` bytes at `offset`, whose end does not overflow.
fn overlapping(
    mapped: &BTreeMap<usize, usize>,
    offset: usize,
    size: usize,
) -> impl Iterator<Item = (usize, usize)> {
    // Mappings do not overlap each other, so at most one that starts before `offset` reaches it.
    let before = mapped
        .range(..offset)
        .next_back()
        .filter(|&(&start, &length)| start + length > offset);
    before
        .into_iter()
        .chain(mapped.range(offset..offset + size))
        .map(|(&start, &length)| (start, length))
}

/// The first of these mappings that does not lie wholly in `size` bytes at `offset`.
fn cut(found: &[(usize, usize)], offset: usize, size: usize) -> Option<(usize, usize)> {
    found
        .iter()
        .copied()
        .find(|&(start, length)| start < offset || start + length > offset + size)
}

fn nonzero(size: usize) -> Result<()> {
    if size == 0 {
        return Err(VmmError::Vmm(cuda_vmm::VmmError::ZeroSize { what: "size" }));
    }
    Ok(())
}

fn within(offset: usize, size: usize, capacity: usize) -> Result<()> {
    nonzero(size)?;
    match offset.checked_add(size) {
        Some(end) if end <= capacity => Ok(()),
        _ => Err(VmmError::InvalidOffset {
            offset,
            size,
            capacity,
        }),
    }
}

fn multiple(value: usize, required: usize) -> Result<()> {
    if !value.is_multiple_of(required) {
        return Err(VmmError::InvalidAlignment {
            actual: value,
            required,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_found_by_the_bytes_that_they_share() {
        let mapped = BTreeMap::from([(0, 4), (8, 4)]);
        let find = |offset, size| overlapping(&mapped, offset, size).collect::<Vec<_>>();
        assert_eq!(find(4, 4), []);
        assert_eq!(find(3, 1), [(0, 4)]);
        assert_eq!(find(3, 6), [(0, 4), (8, 4)]);
        assert_eq!(cut(&find(0, 12), 0, 12), None);
        assert_eq!(cut(&find(1, 11), 1, 11), Some((0, 4)));
        assert_eq!(cut(&find(0, 9), 0, 9), Some((8, 4)));
    }
}
