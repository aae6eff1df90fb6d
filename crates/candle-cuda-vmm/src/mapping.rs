//! Reserves addresses without memory, and maps memory to them by hand.
//!
//! The pools of [`virtual_memory`](crate::virtual_memory) do all this for you. The functions here
//! never wait for the device. If you unmap memory that a kernel still uses, the kernel makes an
//! illegal access and the device's context becomes unusable.
//!
//! Everything here uses the [default driver](default_driver).
//!
//! # Safety
//! A [`VirtualAddressRange`] owns its addresses. It records what [`map_memory`] maps, so that it
//! unmaps that before it frees the addresses. No safe function accesses memory through an address.
#![allow(unsafe_code)]

use crate::cuda_ffi::{self, AccessFlags, DevicePtr};
use crate::device::default_driver;
use crate::error::{Result, VmmError};
use crate::physical_memory::PhysicalMemoryHandle;
use cuda_vmm::{Driver, PerProcess};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A range of reserved addresses (`cuMemAddressReserve`). It costs no memory.
///
/// Dropping it unmaps what [`map_memory`] mapped (`cuMemUnmap`) and frees the addresses
/// (`cuMemAddressFree`). If the driver refuses, both are tried again when the next range is made.
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
    /// `None` after `into_raw`, and for raw addresses if no driver can be opened.
    driver: Option<Driver>,
    /// Whether the range was made by `from_raw`. It may have mappings that are not in `mapped`.
    adopted: bool,
    /// Mappings made by [`map_memory`]: offset and size, in bytes.
    mapped: Mutex<BTreeMap<usize, usize>>,
}

/// Ranges that the driver did not free when they were dropped.
static REFUSED: PerProcess<Mutex<Vec<VirtualAddressRange>>> = PerProcess::new();

impl VirtualAddressRange {
    /// Reserves `size` bytes of addresses, a multiple of the granularity of device 0, aligned to
    /// `alignment` bytes.
    ///
    /// # Errors
    /// - [`Vmm`](VmmError::Vmm) with `ZeroSize` if `size` is 0.
    /// - [`InvalidAlignment`](VmmError::InvalidAlignment) if `size` is not a multiple of the
    ///   granularity, or if `alignment` is not a power of two (`required` is then 0).
    /// - [`Vmm`](VmmError::Vmm) if the driver has no such run of addresses.
    /// - Any error of [`default_driver`].
    pub fn new(size: usize, alignment: usize) -> Result<Self> {
        if !alignment.is_power_of_two() {
            return Err(VmmError::InvalidAlignment {
                actual: alignment,
                required: 0,
            });
        }
        check_nonzero(size)?;
        let granularity = cuda_ffi::get_minimum_granularity(0)?;
        check_multiple(size, granularity)?;
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

    /// Takes ownership of addresses that were reserved elsewhere.
    ///
    /// The range does not know mappings that are already there. It does not unmap them when it is
    /// dropped, and the addresses cannot be freed before they are unmapped.
    ///
    /// # Safety
    /// `ptr` and `size` are one whole reservation of the [default driver](default_driver), with
    /// this alignment in bytes, and nothing else owns it.
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

    /// Returns the first address.
    pub fn base_address(&self) -> usize {
        self.ptr as usize
    }

    /// Returns the size in bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Returns the alignment in bytes that was requested.
    pub fn alignment(&self) -> usize {
        self.alignment
    }

    /// Returns the first address, as the driver's type.
    pub fn as_ptr(&self) -> DevicePtr {
        self.ptr
    }

    /// Returns the address `offset` bytes after the first.
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

    /// Gives up ownership, and returns the first address and the size in bytes.
    ///
    /// The caller unmaps what is mapped there and frees the addresses, for example with
    /// [`mem_address_free`](cuda_ffi::mem_address_free).
    pub fn into_raw(mut self) -> (DevicePtr, usize) {
        self.driver = None;
        (self.ptr, self.size)
    }

    fn driver(&self) -> Result<&Driver> {
        self.driver.as_ref().ok_or(VmmError::UnsupportedDevice)
    }

    /// Locks the record of mappings. Fails in a forked process, where the lock may never be
    /// released.
    fn mapped(&self) -> Result<MutexGuard<'_, BTreeMap<usize, usize>>> {
        self.driver()?.check_process()?;
        Ok(self.mapped.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Unmaps what was mapped here and frees the addresses. After an error the range still owns the
    /// rest.
    fn release(&mut self) -> Result<()> {
        let Some(driver) = &self.driver else {
            return Ok(());
        };
        let mapped = self
            .mapped
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        while let Some((&offset, &size)) = mapped.first_key_value() {
            // SAFETY: this is a whole mapping in the range's own addresses. Only unsafe code can
            // use them in work for the device, and it had to wait for that work.
            unsafe { cuda_ffi::unmap(driver, self.ptr + offset as u64, size) }?;
            mapped.remove(&offset);
        }
        // SAFETY: the range owns the addresses and frees them once, here; its mappings are gone.
        unsafe { cuda_ffi::address_free(driver, self.ptr, self.size) }
    }
}

impl Drop for VirtualAddressRange {
    fn drop(&mut self) {
        let Err(error) = self.release() else { return };
        if error.is_poisoned() || matches!(error, VmmError::Vmm(cuda_vmm::VmmError::Forked)) {
            return;
        }
        tracing::warn!(address = self.ptr, bytes = self.size, %error, "cannot free addresses; the next `VirtualAddressRange::new` retries");
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

/// Drops each refused range again. A range that fails again returns to the list.
fn retry_refused() {
    let refused =
        std::mem::take(&mut *REFUSED.get().lock().unwrap_or_else(PoisonError::into_inner));
    drop(refused);
}

/// Maps physical memory into a range (`cuMemMap`). No device has access until
/// [`set_memory_access`].
///
/// The driver maps whole allocations only: `physical_offset` must be 0 and `size` the handle's
/// size.
///
/// # Errors
/// After an error nothing is mapped.
/// - [`Vmm`](VmmError::Vmm) with `ZeroSize` if `size` is 0, and with `WrongDriver` if range and
///   memory belong to different drivers.
/// - [`InvalidOffset`](VmmError::InvalidOffset) if the bytes lie outside of the range or of the
///   memory, or an end overflows.
/// - [`InvalidAlignment`](VmmError::InvalidAlignment) unless `offset` is a multiple of the
///   granularity.
/// - [`MappingFailed`](VmmError::MappingFailed) if `physical_offset` and `size` are a part of the
///   memory only.
/// - [`AlreadyMapped`](VmmError::AlreadyMapped) if memory is already mapped to any of the bytes.
/// - [`UnsupportedDevice`](VmmError::UnsupportedDevice) if the driver or the memory's device could
///   not be opened.
/// - [`Vmm`](VmmError::Vmm) if the driver call fails.
pub fn map_memory(
    virtual_range: &VirtualAddressRange,
    offset: usize,
    physical_handle: &PhysicalMemoryHandle,
    physical_offset: usize,
    size: usize,
) -> Result<()> {
    check_range(offset, size, virtual_range.size)?;
    check_range(physical_offset, size, physical_handle.size())?;
    let driver = virtual_range.driver()?;
    let memory = physical_handle
        .memory()
        .ok_or(VmmError::UnsupportedDevice)?;
    if !driver.is_same(memory.device().driver()) {
        return Err(VmmError::Vmm(cuda_vmm::VmmError::WrongDriver));
    }
    check_multiple(offset, memory.device().granularity_bytes())?;
    if physical_offset != 0 || size != physical_handle.size() {
        return Err(VmmError::MappingFailed(format!(
            "{size} bytes at offset {physical_offset} are only a part of an allocation of {} bytes",
            physical_handle.size()
        )));
    }
    let ptr = virtual_range.ptr_at_offset(offset)?;
    // Locked during the call, so that record and driver agree when threads map and unmap at once.
    let mut mapped = virtual_range.mapped()?;
    if overlapping(&mapped, offset, size).next().is_some() {
        return Err(VmmError::AlreadyMapped { offset, size });
    }
    // SAFETY: the addresses lie in the range, which unmaps before it frees them. The handle is
    // alive.
    unsafe { cuda_ffi::map(driver, ptr, size, 0, physical_handle.as_raw()) }?;
    mapped.insert(offset, size);
    Ok(())
}

/// Unmaps whole mappings (`cuMemUnmap`). The bytes may have gaps. It does not wait for the device.
///
/// # Errors
/// After an error nothing is unmapped.
/// - [`Vmm`](VmmError::Vmm) with `ZeroSize` if `size` is 0.
/// - [`InvalidOffset`](VmmError::InvalidOffset) if the bytes lie outside of the range, or the end
///   overflows.
/// - [`NotMapped`](VmmError::NotMapped) if nothing is mapped there.
/// - [`UnmappingFailed`](VmmError::UnmappingFailed) if the bytes cover a part of a mapping only.
/// - [`Vmm`](VmmError::Vmm) if the driver call fails.
pub fn unmap_memory(virtual_range: &VirtualAddressRange, offset: usize, size: usize) -> Result<()> {
    check_range(offset, size, virtual_range.size)?;
    let driver = virtual_range.driver()?;
    let ptr = virtual_range.ptr_at_offset(offset)?;
    let mut mapped = virtual_range.mapped()?;
    let found: Vec<(usize, usize)> = overlapping(&mapped, offset, size).collect();
    if found.is_empty() && !virtual_range.adopted {
        return Err(VmmError::NotMapped { offset, size });
    }
    if let Some((start, length)) = first_partial(&found, offset, size) {
        return Err(VmmError::UnmappingFailed(format!(
            "{size} bytes at offset {offset} cover only a part of the mapping of {length} bytes at offset {start}"
        )));
    }
    // SAFETY: the addresses are the range's own. Only unsafe code can use them in work for the
    // device, and it had to wait for that work.
    unsafe { cuda_ffi::unmap(driver, ptr, size) }?;
    for (start, _) in found {
        mapped.remove(&start);
    }
    Ok(())
}

/// Sets a device's access to whole, adjacent mappings (`cuMemSetAccess`).
///
/// # Errors
/// After an error the access is unchanged.
/// - [`Vmm`](VmmError::Vmm) with `ZeroSize` if `size` is 0.
/// - [`InvalidOffset`](VmmError::InvalidOffset) if the bytes lie outside of the range, or the end
///   overflows.
/// - [`NotMapped`](VmmError::NotMapped) unless memory is mapped to all of the bytes.
/// - [`MappingFailed`](VmmError::MappingFailed) if the bytes cover a part of a mapping only.
/// - [`Vmm`](VmmError::Vmm) if the driver call fails, for example because there is no such device.
pub fn set_memory_access(
    virtual_range: &VirtualAddressRange,
    offset: usize,
    size: usize,
    device_ordinal: i32,
    flags: AccessFlags,
) -> Result<()> {
    check_range(offset, size, virtual_range.size)?;
    let driver = virtual_range.driver()?;
    let ptr = virtual_range.ptr_at_offset(offset)?;
    let mapped = virtual_range.mapped()?;
    if !virtual_range.adopted {
        let found: Vec<(usize, usize)> = overlapping(&mapped, offset, size).collect();
        if let Some((start, length)) = first_partial(&found, offset, size) {
            return Err(VmmError::MappingFailed(format!(
                "{size} bytes at offset {offset} cover only a part of the mapping of {length} bytes at offset {start}"
            )));
        }
        if found.iter().map(|(_, length)| length).sum::<usize>() != size {
            return Err(VmmError::NotMapped { offset, size });
        }
    }
    // SAFETY: the addresses are the range's own. Only unsafe code can use them in work for the
    // device.
    unsafe { cuda_ffi::set_access(driver, ptr, size, device_ordinal, flags) }
}

/// Returns the mappings that share a byte with `size` bytes at `offset`, whose end must not
/// overflow.
fn overlapping(
    mapped: &BTreeMap<usize, usize>,
    offset: usize,
    size: usize,
) -> impl Iterator<Item = (usize, usize)> {
    // Mappings do not overlap, so at most one that starts before `offset` reaches it.
    let before = mapped
        .range(..offset)
        .next_back()
        .filter(|&(&start, &length)| start + length > offset);
    before
        .into_iter()
        .chain(mapped.range(offset..offset + size))
        .map(|(&start, &length)| (start, length))
}

/// Returns the first of these mappings that does not lie wholly in `size` bytes at `offset`.
fn first_partial(found: &[(usize, usize)], offset: usize, size: usize) -> Option<(usize, usize)> {
    found
        .iter()
        .copied()
        .find(|&(start, length)| start < offset || start + length > offset + size)
}

fn check_nonzero(size: usize) -> Result<()> {
    if size == 0 {
        return Err(VmmError::Vmm(cuda_vmm::VmmError::ZeroSize { what: "size" }));
    }
    Ok(())
}

fn check_range(offset: usize, size: usize, capacity: usize) -> Result<()> {
    check_nonzero(size)?;
    match offset.checked_add(size) {
        Some(end) if end <= capacity => Ok(()),
        _ => Err(VmmError::InvalidOffset {
            offset,
            size,
            capacity,
        }),
    }
}

fn check_multiple(value: usize, required: usize) -> Result<()> {
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
        assert_eq!(first_partial(&find(0, 12), 0, 12), None);
        assert_eq!(first_partial(&find(1, 11), 1, 11), Some((0, 4)));
        assert_eq!(first_partial(&find(0, 9), 0, 9), Some((8, 4)));
    }
}
