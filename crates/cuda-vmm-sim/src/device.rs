//! What a simulated device says of itself.

use crate::SimConfig;
use crate::state::Answer;
use cuda_vmm_sys::*;
use std::os::raw::c_int;

/// The device's name.
pub(crate) fn name(ordinal: usize) -> String {
    format!("Simulated device {ordinal}")
}

/// The same for a device of the same number in every process, as a device that they share would have.
pub(crate) fn uuid(ordinal: usize) -> [u8; 16] {
    let mut bytes = *b"cuda-vmm-sim\0\0\0\0";
    bytes[12..].copy_from_slice(&(ordinal as u32).to_be_bytes());
    bytes
}

/// The attributes that have a meaning here; the others are not guessed.
pub(crate) fn attribute(config: &SimConfig, attribute: CUdevice_attribute) -> Answer<c_int> {
    match attribute {
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT => Ok(132),
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR => Ok(9),
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR => Ok(0),
        CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED => Ok(1),
        CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED => Ok(config.backed.into()),
        // `cuMemAllocAsync` and `cuMemFreeAsync` are there.
        CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED => Ok(1),
        _ => Err(CUDA_ERROR_INVALID_VALUE),
    }
}
