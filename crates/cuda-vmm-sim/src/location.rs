//! Reads and writes the header's location, property and access structures.
//!
//! # Safety
//! Newer headers have the device number of `CUmemLocation` in an anonymous union. All have the same
//! layout, two 32-bit fields. So this module reads and writes it by layout and not by field name.

use crate::state::{DriverResult, State};
use cuda_vmm_sys::*;

/// `CUmemLocation` by layout.
#[repr(C)]
#[derive(Clone, Copy)]
struct Location {
    kind: CUmemLocationType,
    id: i32,
}

const _: () = assert!(size_of::<Location>() == size_of::<CUmemLocation>());
const _: () = assert!(align_of::<Location>() == align_of::<CUmemLocation>());

fn read(location: &CUmemLocation) -> Location {
    // SAFETY: both types have the same size and alignment (see the assertions) and the module's
    // layout. Every bit pattern is a valid pair of integers.
    unsafe { *(&raw const *location).cast::<Location>() }
}

fn device_location(device: usize) -> CUmemLocation {
    let location = Location {
        kind: CU_MEM_LOCATION_TYPE_DEVICE,
        id: device as i32,
    };
    // SAFETY: as in `read`, in the other direction.
    unsafe { *(&raw const location).cast::<CUmemLocation>() }
}

/// The access of one device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    pub(crate) device: usize,
    pub(crate) flags: CUmemAccess_flags,
}

/// The properties of an allocation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Properties {
    pub(crate) device: usize,
    pub(crate) shareable: bool,
}

impl State {
    /// Returns the device of a location.
    pub(crate) fn read_location(&self, location: &CUmemLocation) -> DriverResult<usize> {
        let location = read(location);
        if location.kind != CU_MEM_LOCATION_TYPE_DEVICE {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        self.device(location.id)
    }

    /// Converts an access descriptor.
    pub(crate) fn read_descriptor(&self, descriptor: &CUmemAccessDesc) -> DriverResult<Descriptor> {
        let flags = descriptor.flags;
        let known = [
            CU_MEM_ACCESS_FLAGS_PROT_NONE,
            CU_MEM_ACCESS_FLAGS_PROT_READ,
            CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        ];
        if !known.contains(&flags) {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        let device = self
            .read_location(&descriptor.location)
            .map_err(|_| CUDA_ERROR_INVALID_VALUE)?;
        Ok(Descriptor { device, flags })
    }

    /// Converts allocation properties. Fails unless they are pinned memory of a device that exists,
    /// exportable by file descriptor or not at all.
    pub(crate) fn read_properties(
        &self,
        properties: &CUmemAllocationProp,
    ) -> DriverResult<Properties> {
        let shareable = read_kind(properties)?;
        let device = self.read_location(&properties.location)?;
        Ok(Properties { device, shareable })
    }
}

/// Returns whether allocation properties ask for exportable memory. Fails unless they are pinned
/// device memory. The device need not exist.
pub(crate) fn read_kind(properties: &CUmemAllocationProp) -> DriverResult<bool> {
    let pinned = properties.type_ == CU_MEM_ALLOCATION_TYPE_PINNED;
    if !pinned || read(&properties.location).kind != CU_MEM_LOCATION_TYPE_DEVICE {
        return Err(CUDA_ERROR_INVALID_VALUE);
    }
    match properties.requestedHandleTypes {
        CU_MEM_HANDLE_TYPE_NONE => Ok(false),
        CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR => Ok(true),
        _ => Err(CUDA_ERROR_NOT_SUPPORTED),
    }
}

/// Returns the driver's structure for an allocation's properties.
pub(crate) fn write_properties(properties: Properties) -> CUmemAllocationProp {
    CUmemAllocationProp {
        type_: CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: match properties.shareable {
            true => CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
            false => CU_MEM_HANDLE_TYPE_NONE,
        },
        location: device_location(properties.device),
        win32HandleMetaData: std::ptr::null_mut(),
        // SAFETY: the structure holds integers only, and zero is valid for them.
        allocFlags: unsafe { std::mem::zeroed() },
    }
}
