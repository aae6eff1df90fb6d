//! The properties of a simulated device.

use crate::SimConfig;
use crate::state::DriverResult;
use cuda_vmm_sys::*;
use std::os::raw::c_int;

/// Returns the device's name.
pub(crate) fn name(ordinal: usize) -> String {
    format!("Simulated device {ordinal}")
}

/// Returns a UUID by the device's number. It is the same in every process, as for a shared device.
pub(crate) fn uuid(ordinal: usize) -> [u8; 16] {
    let mut bytes = *b"cuda-vmm-sim\0\0\0\0";
    bytes[12..].copy_from_slice(&(ordinal as u32).to_be_bytes());
    bytes
}

/// Returns an attribute. Fails for attributes that are not simulated.
pub(crate) fn attribute(config: &SimConfig, attribute: CUdevice_attribute) -> DriverResult<c_int> {
    match attribute {
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT => Ok(132),
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR => Ok(9),
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR => Ok(0),
        CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED => Ok(1),
        CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED => Ok(config.backed.into()),
        // `cuMemAllocAsync` and `cuMemFreeAsync` are simulated.
        CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED => Ok(1),
        _ => Err(CUDA_ERROR_INVALID_VALUE),
    }
}
