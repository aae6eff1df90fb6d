//! Thin wrappers of driver calls.
//!
//! Each function makes one call of the [default driver](crate::device::default_driver). If it
//! fails, the error is [`VmmError::Vmm`] with the call and the driver's code.
//!
//! This module does not track what it creates: the caller releases it.
//!
//! # Safety
//! The unsafe functions have the requirements of the CUDA calls that they wrap. This module relies
//! on two more facts: the table's function pointers are valid while the driver lives, and
//! out-parameters and descriptors live during the call.
#![allow(unsafe_code)]

use crate::device::default_driver;
use crate::error::{Result, VmmError};
use cuda_vmm::Driver;
use cuda_vmm::sys::{self, DriverFunction};

/// The kind of place where memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryLocationType {
    /// Device memory.
    Device,
}

/// The properties of memory to allocate.
#[derive(Debug, Clone)]
pub struct AllocationProp {
    /// The kind of place.
    pub location_type: MemoryLocationType,
    /// The device's number.
    pub device_ordinal: i32,
}

impl AllocationProp {
    /// Returns the properties of memory on a device.
    pub fn device(device_ordinal: i32) -> Self {
        Self {
            location_type: MemoryLocationType::Device,
            device_ordinal,
        }
    }

    /// Converts to the driver's struct: pinned memory that cannot be exported.
    fn to_driver(&self) -> sys::CUmemAllocationProp {
        // SAFETY: the struct holds integers and a pointer; all zeros are valid for them.
        let mut properties: sys::CUmemAllocationProp = unsafe { std::mem::zeroed() };
        properties.type_ = sys::CU_MEM_ALLOCATION_TYPE_PINNED;
        properties.location.type_ = match self.location_type {
            MemoryLocationType::Device => sys::CU_MEM_LOCATION_TYPE_DEVICE,
        };
        properties.location.id = self.device_ordinal;
        properties
    }
}

/// A device's access to mapped memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AccessFlags {
    /// No access.
    None = 0,
    /// Read access.
    Read = 1,
    /// Read and write access.
    ReadWrite = 3,
}

impl AccessFlags {
    fn to_driver(self) -> sys::CUmemAccess_flags {
        match self {
            Self::None => sys::CU_MEM_ACCESS_FLAGS_PROT_NONE,
            Self::Read => sys::CU_MEM_ACCESS_FLAGS_PROT_READ,
            Self::ReadWrite => sys::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        }
    }
}

/// A handle of physical memory.
pub type MemGenericAllocationHandle = sys::CUmemGenericAllocationHandle;

/// A device address.
pub type DevicePtr = sys::CUdeviceptr;

/// Allocates `size` bytes of physical memory, a multiple of the granularity (`cuMemCreate`).
///
/// # Errors
/// [`VmmError::Vmm`] with the driver's code: `CUDA_ERROR_INVALID_VALUE` if `size` is 0 or no
/// multiple of the granularity, `CUDA_ERROR_OUT_OF_MEMORY` if the device has too little memory.
///
/// # Safety
/// As the CUDA call. The caller owns the handle and releases it once.
pub unsafe fn mem_create(size: usize, prop: &AllocationProp) -> Result<MemGenericAllocationHandle> {
    let properties = prop.to_driver();
    let mut handle = 0;
    // SAFETY: `handle` is a valid out-parameter, and the properties live during the call.
    unsafe {
        call!(
            &default_driver()?,
            cuMemCreate(&mut handle, size, &properties, 0)
        )
    }?;
    Ok(handle)
}

/// Releases a handle of physical memory (`cuMemRelease`).
///
/// Memory that is still mapped stays until it is unmapped.
///
/// # Errors
/// [`VmmError::Vmm`] with the driver's code.
///
/// # Safety
/// The caller owns one reference to the handle and gives it up.
pub unsafe fn mem_release(handle: MemGenericAllocationHandle) -> Result<()> {
    // SAFETY: the caller guarantees what the call requires.
    unsafe { call!(&default_driver()?, cuMemRelease(handle)) }
}

/// Reserves `size` bytes of addresses, a multiple of the granularity (`cuMemAddressReserve`).
///
/// `alignment` is in bytes; 0 selects the driver's own. The driver reserves at `addr` if that is
/// not 0 and is free.
///
/// # Errors
/// [`VmmError::Vmm`] with the driver's code: `CUDA_ERROR_INVALID_VALUE` if `size` is 0,
/// `CUDA_ERROR_OUT_OF_MEMORY` if there is no such run of addresses.
///
/// # Safety
/// As the CUDA call. The caller owns the addresses and frees them once.
pub unsafe fn mem_address_reserve(
    size: usize,
    alignment: usize,
    addr: DevicePtr,
) -> Result<DevicePtr> {
    // SAFETY: the caller guarantees what the call requires.
    unsafe { address_reserve(&default_driver()?, size, alignment, addr) }
}

/// As [`mem_address_reserve`], with a given driver.
pub(crate) unsafe fn address_reserve(
    driver: &Driver,
    size: usize,
    alignment: usize,
    addr: DevicePtr,
) -> Result<DevicePtr> {
    let mut address = 0;
    // SAFETY: `address` is a valid out-parameter; the caller guarantees the rest.
    unsafe {
        call!(
            driver,
            cuMemAddressReserve(&mut address, size, alignment, addr, 0)
        )
    }?;
    Ok(address)
}

/// Frees reserved addresses (`cuMemAddressFree`).
///
/// # Errors
/// [`VmmError::Vmm`] with the driver's code: `CUDA_ERROR_INVALID_VALUE` while anything is mapped
/// there.
///
/// # Safety
/// `ptr` and `size` are one whole reservation, which the caller owns and gives up.
pub unsafe fn mem_address_free(ptr: DevicePtr, size: usize) -> Result<()> {
    // SAFETY: the caller guarantees what the call requires.
    unsafe { address_free(&default_driver()?, ptr, size) }
}

/// As [`mem_address_free`], with a given driver.
pub(crate) unsafe fn address_free(driver: &Driver, ptr: DevicePtr, size: usize) -> Result<()> {
    // SAFETY: the caller guarantees what the call requires.
    unsafe { call!(driver, cuMemAddressFree(ptr, size)) }
}

/// Maps all of a handle's memory at an address, without access (`cuMemMap`).
///
/// # Errors
/// [`VmmError::Vmm`] with the driver's code: `CUDA_ERROR_NOT_SUPPORTED` unless `offset` is 0 and
/// `size` the handle's size, `CUDA_ERROR_INVALID_VALUE` if something is already mapped there.
///
/// # Safety
/// The addresses lie in a reservation that outlives the mapping, and the handle is alive.
pub unsafe fn mem_map(
    ptr: DevicePtr,
    size: usize,
    offset: usize,
    handle: MemGenericAllocationHandle,
) -> Result<()> {
    // SAFETY: the caller guarantees what the call requires.
    unsafe { map(&default_driver()?, ptr, size, offset, handle) }
}

/// As [`mem_map`], with a given driver.
pub(crate) unsafe fn map(
    driver: &Driver,
    ptr: DevicePtr,
    size: usize,
    offset: usize,
    handle: MemGenericAllocationHandle,
) -> Result<()> {
    // SAFETY: the caller guarantees what the call requires.
    unsafe { call!(driver, cuMemMap(ptr, size, offset, handle, 0)) }
}

/// Unmaps whole mappings (`cuMemUnmap`). It does not wait for the device.
///
/// # Errors
/// [`VmmError::Vmm`] with the driver's code: `CUDA_ERROR_INVALID_VALUE` for a part of a mapping.
///
/// # Safety
/// No work that is queued now or later uses the addresses.
pub unsafe fn mem_unmap(ptr: DevicePtr, size: usize) -> Result<()> {
    // SAFETY: the caller guarantees what the call requires.
    unsafe { unmap(&default_driver()?, ptr, size) }
}

/// As [`mem_unmap`], with a given driver.
pub(crate) unsafe fn unmap(driver: &Driver, ptr: DevicePtr, size: usize) -> Result<()> {
    // SAFETY: the caller guarantees what the call requires.
    unsafe { call!(driver, cuMemUnmap(ptr, size)) }
}

/// Sets a device's access to whole mappings (`cuMemSetAccess`).
///
/// # Errors
/// [`VmmError::Vmm`] with the driver's code: `CUDA_ERROR_INVALID_VALUE` for a part of a mapping,
/// for bytes that are not all mapped, and for a device that does not exist.
///
/// # Safety
/// As the CUDA call: no queued work needs access that is removed.
pub unsafe fn mem_set_access(
    ptr: DevicePtr,
    size: usize,
    device_ordinal: i32,
    flags: AccessFlags,
) -> Result<()> {
    // SAFETY: the caller guarantees what the call requires.
    unsafe { set_access(&default_driver()?, ptr, size, device_ordinal, flags) }
}

/// As [`mem_set_access`], with a given driver.
pub(crate) unsafe fn set_access(
    driver: &Driver,
    ptr: DevicePtr,
    size: usize,
    device_ordinal: i32,
    flags: AccessFlags,
) -> Result<()> {
    let descriptor = sys::CUmemAccessDesc {
        location: AllocationProp::device(device_ordinal).to_driver().location,
        flags: flags.to_driver(),
    };
    // SAFETY: the descriptor lives during the call; the caller guarantees the rest.
    unsafe { call!(driver, cuMemSetAccess(ptr, size, &descriptor, 1)) }
}

/// Returns the granularity in bytes of physical memory with these properties
/// (`cuMemGetAllocationGranularity`).
///
/// # Errors
/// [`VmmError::Vmm`] with the driver's code. A driver may return a granularity even for a device
/// that does not exist; an H200's does.
///
/// # Safety
/// `option` is one of the driver's `CU_MEM_ALLOC_GRANULARITY` values.
pub unsafe fn mem_get_allocation_granularity(
    prop: &AllocationProp,
    option: sys::CUmemAllocationGranularity_flags,
) -> Result<usize> {
    let properties = prop.to_driver();
    let mut granularity = 0;
    // SAFETY: `granularity` is a valid out-parameter, and the properties live during the call.
    unsafe {
        call!(
            &default_driver()?,
            cuMemGetAllocationGranularity(&mut granularity, &properties, option)
        )
    }?;
    Ok(granularity)
}

/// Returns the recommended granularity of a device in bytes.
///
/// # Errors
/// As [`mem_get_allocation_granularity`].
pub fn get_recommended_granularity(device_ordinal: i32) -> Result<usize> {
    let prop = AllocationProp::device(device_ordinal);
    // SAFETY: the option is one of the driver's.
    unsafe { mem_get_allocation_granularity(&prop, sys::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED) }
}

/// Returns the smallest granularity of a device in bytes.
///
/// # Errors
/// As [`mem_get_allocation_granularity`].
pub fn get_minimum_granularity(device_ordinal: i32) -> Result<usize> {
    let prop = AllocationProp::device(device_ordinal);
    // SAFETY: the option is one of the driver's.
    unsafe { mem_get_allocation_granularity(&prop, sys::CU_MEM_ALLOC_GRANULARITY_MINIMUM) }
}

/// Calls an entry point of a driver's table and converts its code to a `Result`.
macro_rules! call {
    ($driver:expr, $function:ident($($argument:expr),* $(,)?)) => {{
        let driver: &Driver = $driver;
        driver.check_process()?;
        let code = (driver.table().$function)($($argument),*);
        driver.check(DriverFunction::$function, code).map_err(VmmError::Vmm)
    }};
}
use call;
