//! Reading and writing the header's location, property and access structures.
//!
//! # Safety
//! Newer headers put the device number of `CUmemLocation` into an anonymous union. Its layout is the
//! same in all of them, two 32-bit fields, so it is read and written by layout and not by field name.

use crate::memory::Properties;
use crate::state::{Answer, State};
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
    // SAFETY: both types have the same size and alignment (above), and the layout named at the top;
    // every bit pattern is a valid pair of integers.
    unsafe { *(&raw const *location).cast::<Location>() }
}

fn device_location(device: usize) -> CUmemLocation {
    let location = Location {
        kind: CU_MEM_LOCATION_TYPE_DEVICE,
        id: device as i32,
    };
    // SAFETY: as in `read`, the other way round.
    unsafe { *(&raw const location).cast::<CUmemLocation>() }
}

/// What one device is to be allowed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    pub(crate) device: usize,
    pub(crate) flags: CUmemAccess_flags,
}

impl State {
    /// The device that a location names.
    pub(crate) fn read_location(&self, location: &CUmemLocation) -> Answer<usize> {
        let location = read(location);
        if location.kind != CU_MEM_LOCATION_TYPE_DEVICE {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        self.device(location.id)
    }

    /// What an access descriptor says.
    pub(crate) fn read_descriptor(&self, descriptor: &CUmemAccessDesc) -> Answer<Descriptor> {
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

    /// What allocation properties ask for: pinned memory of one of the devices, exportable by file
    /// descriptor or not at all.
    pub(crate) fn read_properties(&self, properties: &CUmemAllocationProp) -> Answer<Properties> {
        let shareable = read_kind(properties)?;
        let device = self.read_location(&properties.location)?;
        Ok(Properties { device, shareable })
    }
}

/// What allocation properties ask for on whatever device, which need not exist: pinned memory of a
/// device, and whether it can be exported.
pub(crate) fn read_kind(properties: &CUmemAllocationProp) -> Answer<bool> {
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

/// The structure that describes an allocation.
pub(crate) fn write_properties(properties: Properties) -> CUmemAllocationProp {
    CUmemAllocationProp {
        type_: CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: match properties.shareable {
            true => CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
            false => CU_MEM_HANDLE_TYPE_NONE,
        },
        location: device_location(properties.device),
        win32HandleMetaData: std::ptr::null_mut(),
        // SAFETY: the structure holds integers only, for which zero is valid.
        allocFlags: unsafe { std::mem::zeroed() },
    }
}
