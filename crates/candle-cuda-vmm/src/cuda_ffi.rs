//! The driver's calls, nearly as they are.
//!
//! Each function is one driver call of the [default driver](crate::device::default_driver). A failed
//! call is [`VmmError::Vmm`] with the call and the driver's code.
//!
//! Nothing here remembers what was made: whoever makes something gives it back.
//!
//! # Safety
//! The unsafe functions are as unsafe as the CUDA calls of their names. What this module itself relies
//! on is that the table's pointers are valid while the driver lives, and that out-parameters and
//! descriptors are alive during the call.
#![allow(unsafe_code)]

use crate::device::default_driver;
use crate::error::{Result, VmmError};
use cuda_vmm::Driver;
use cuda_vmm::sys::{self, DriverFunction};

/// Kind of place where memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryLocationType {
    /// On a device.
    Device,
}

/// What memory is to be made like.
#[derive(Debug, Clone)]
pub struct AllocationProp {
    /// Kind of place.
    pub location_type: MemoryLocationType,
    /// Number of the device.
    pub device_ordinal: i32,
}

impl AllocationProp {
    /// Memory on the device of this number.
    pub fn device(device_ordinal: i32) -> Self {
        Self {
            location_type: MemoryLocationType::Device,
            device_ordinal,
        }
    }

    /// The driver's own form: pinned memory that cannot be exported.
    fn to_driver(&self) -> sys::CUmemAllocationProp {
        // SAFETY: the struct holds integers and a pointer, for which all zeros is valid.
        let mut properties: sys::CUmemAllocationProp = unsafe { std::mem::zeroed() };
        properties.type_ = sys::CU_MEM_ALLOCATION_TYPE_PINNED;
        properties.location.type_ = match self.location_type {
            MemoryLocationType::Device => sys::CU_MEM_LOCATION_TYPE_DEVICE,
        };
        properties.location.id = self.device_ordinal;
        properties
    }
}

/// What a device may do with mapped memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AccessFlags {
    /// Nothing.
    None = 0,
    /// Read.
    Read = 1,
    /// Read and write.
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

/// An address of a device.
pub type DevicePtr = sys::CUdeviceptr;

/// Takes `size` bytes of physical memory, a multiple of the granularity (`cuMemCreate`).
///
/// # Errors
/// What the driver answers: `CUDA_ERROR_INVALID_VALUE` for a size of 0 or off the granularity,
/// `CUDA_ERROR_OUT_OF_MEMORY`.
///
/// # Safety
/// As the CUDA call. The caller owns the handle and releases it once.
pub unsafe fn mem_create(size: usize, prop: &AllocationProp) -> Result<MemGenericAllocationHandle> {
    let properties = prop.to_driver();
    let mut handle = 0;
    // SAFETY: `handle` is a valid place and the properties are alive during the call.
    unsafe {
        call!(
            &default_driver()?,
            cuMemCreate(&mut handle, size, &properties, 0)
        )
    }?;
    Ok(handle)
}

/// Releases a handle of physical memory (`cuMemRelease`). Memory that is still mapped stays until it is
/// unmapped.
///
/// # Errors
/// What the driver answers.
///
/// # Safety
/// The caller owns one reference to the handle and gives it up.
pub unsafe fn mem_release(handle: MemGenericAllocationHandle) -> Result<()> {
    // SAFETY: the caller's promise is the call's.
    unsafe { call!(&default_driver()?, cuMemRelease(handle)) }
}

/// Reserves `size` bytes of addresses, a multiple of the granularity, at a multiple of `alignment` (0
/// for the driver's own); at `addr` if that is not 0 and free (`cuMemAddressReserve`).
///
/// # Errors
/// What the driver answers: `CUDA_ERROR_INVALID_VALUE` for a size of 0, `CUDA_ERROR_OUT_OF_MEMORY` where
/// there is no such run of addresses.
///
/// # Safety
/// As the CUDA call. The caller owns the addresses and frees them once.
pub unsafe fn mem_address_reserve(
    size: usize,
    alignment: usize,
    addr: DevicePtr,
) -> Result<DevicePtr> {
    // SAFETY: the caller's promise is the call's.
    unsafe { address_reserve(&default_driver()?, size, alignment, addr) }
}

/// As [`mem_address_reserve`], of a given driver.
pub(crate) unsafe fn address_reserve(
    driver: &Driver,
    size: usize,
    alignment: usize,
    addr: DevicePtr,
) -> Result<DevicePtr> {
    let mut address = 0;
    // SAFETY: `address` is a valid place; the rest is the caller's promise.
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
/// What the driver answers: `CUDA_ERROR_INVALID_VALUE` while anything is mapped there.
///
/// # Safety
/// Address and size are those of one reservation, which the caller owns and gives up.
pub unsafe fn mem_address_free(ptr: DevicePtr, size: usize) -> Result<()> {
    // SAFETY: the caller's promise is the call's.
    unsafe { address_free(&default_driver()?, ptr, size) }
}

/// As [`mem_address_free`], of a given driver.
pub(crate) unsafe fn address_free(driver: &Driver, ptr: DevicePtr, size: usize) -> Result<()> {
    // SAFETY: the caller's promise is the call's.
    unsafe { call!(driver, cuMemAddressFree(ptr, size)) }
}

/// Maps all of a handle's memory at an address, without access (`cuMemMap`).
///
/// # Errors
/// What the driver answers: `CUDA_ERROR_NOT_SUPPORTED` unless `offset` is 0 and `size` is the handle's
/// own, `CUDA_ERROR_INVALID_VALUE` where something is mapped already.
///
/// # Safety
/// The addresses lie in a reservation that lasts as long as the mapping, and the handle is alive.
pub unsafe fn mem_map(
    ptr: DevicePtr,
    size: usize,
    offset: usize,
    handle: MemGenericAllocationHandle,
) -> Result<()> {
    // SAFETY: the caller's promise is the call's.
    unsafe { map(&default_driver()?, ptr, size, offset, handle) }
}

/// As [`mem_map`], of a given driver.
pub(crate) unsafe fn map(
    driver: &Driver,
    ptr: DevicePtr,
    size: usize,
    offset: usize,
    handle: MemGenericAllocationHandle,
) -> Result<()> {
    // SAFETY: the caller's promise is the call's.
    unsafe { call!(driver, cuMemMap(ptr, size, offset, handle, 0)) }
}

/// Unmaps whole mappings (`cuMemUnmap`). It does not wait for the device.
///
/// # Errors
/// What the driver answers: `CUDA_ERROR_INVALID_VALUE` for part of a mapping.
///
/// # Safety
/// No work that is under way, or launched later, uses the addresses.
pub unsafe fn mem_unmap(ptr: DevicePtr, size: usize) -> Result<()> {
    // SAFETY: the caller's promise is the call's.
    unsafe { unmap(&default_driver()?, ptr, size) }
}

/// As [`mem_unmap`], of a given driver.
pub(crate) unsafe fn unmap(driver: &Driver, ptr: DevicePtr, size: usize) -> Result<()> {
    // SAFETY: the caller's promise is the call's.
    unsafe { call!(driver, cuMemUnmap(ptr, size)) }
}

/// Sets what a device may do with whole mappings (`cuMemSetAccess`).
///
/// # Errors
/// What the driver answers: `CUDA_ERROR_INVALID_VALUE` for part of a mapping, a range that is not
/// mapped throughout, or a device that is not there.
///
/// # Safety
/// As the CUDA call: no work under way needs access that is taken away.
pub unsafe fn mem_set_access(
    ptr: DevicePtr,
    size: usize,
    device_ordinal: i32,
    flags: AccessFlags,
) -> Result<()> {
    // SAFETY: the caller's promise is the call's.
    unsafe { set_access(&default_driver()?, ptr, size, device_ordinal, flags) }
}

/// As [`mem_set_access`], of a given driver.
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
    // SAFETY: the descriptor is alive during the call; the rest is the caller's promise.
    unsafe { call!(driver, cuMemSetAccess(ptr, size, &descriptor, 1)) }
}

/// Granularity in bytes of physical memory of such properties (`cuMemGetAllocationGranularity`).
///
/// # Errors
/// What the driver answers. For a device that is not there, an H200's driver answered a granularity.
///
/// # Safety
/// `option` is one of the driver's `CU_MEM_ALLOC_GRANULARITY` values.
pub unsafe fn mem_get_allocation_granularity(
    prop: &AllocationProp,
    option: sys::CUmemAllocationGranularity_flags,
) -> Result<usize> {
    let properties = prop.to_driver();
    let mut granularity = 0;
    // SAFETY: `granularity` is a valid place and the properties are alive during the call.
    unsafe {
        call!(
            &default_driver()?,
            cuMemGetAllocationGranularity(&mut granularity, &properties, option)
        )
    }?;
    Ok(granularity)
}

/// The granularity in bytes that the driver recommends for a device.
///
/// # Errors
/// As [`mem_get_allocation_granularity`].
pub fn get_recommended_granularity(device_ordinal: i32) -> Result<usize> {
    let prop = AllocationProp::device(device_ordinal);
    // SAFETY: the option is one of the driver's.
    unsafe { mem_get_allocation_granularity(&prop, sys::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED) }
}

/// The smallest granularity in bytes of a device.
///
/// # Errors
/// As [`mem_get_allocation_granularity`].
pub fn get_minimum_granularity(device_ordinal: i32) -> Result<usize> {
    let prop = AllocationProp::device(device_ordinal);
    // SAFETY: the option is one of the driver's.
    unsafe { mem_get_allocation_granularity(&prop, sys::CU_MEM_ALLOC_GRANULARITY_MINIMUM) }
}

/// Calls an entry point of a driver's table and turns its code into a `Result`.
macro_rules! call {
    ($driver:expr, $function:ident($($argument:expr),* $(,)?)) => {{
        let driver: &Driver = $driver;
        driver.check_process()?;
        let code = (driver.table().$function)($($argument),*);
        driver.check(DriverFunction::$function, code).map_err(VmmError::Vmm)
    }};
}
use call;
