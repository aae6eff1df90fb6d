//! Compares the Rust side of everything we pass with what the C compiler makes of the same header: the
//! generated bindings, and the declarations written by hand for builds without a header.

#![cfg(target_os = "linux")]

use core::ffi::{CStr, c_char, c_int, c_ulonglong};
use std::ffi::CString;

unsafe extern "C" {
    fn cuda_vmm_witness(name: *const c_char, value: *mut c_ulonglong) -> c_int;
    fn cuda_vmm_witness_count() -> c_ulonglong;
}

fn witness(name: &str) -> Option<u64> {
    let name = CString::new(name).unwrap();
    let mut value = 0;
    // SAFETY: the name is a C string and the value a valid place, both alive during the call.
    let known = unsafe { cuda_vmm_witness(CStr::as_ptr(&name), &mut value) };
    (known == 1).then_some(value)
}

macro_rules! compare {
    (
        $module:path;
        sizes { $($type:ident),* $(,)? }
        offsets { $($struct:ident: $($field:ident $(. $inner:ident)? = $c_field:literal),*;)* }
        values { $($constant:ident),* $(,)? }
    ) => {{
        use $module as rust;
        let rows: Vec<(String, u64)> = vec![
            $(
                (format!("size {}", stringify!($type)), size_of::<rust::$type>() as u64),
                (format!("align {}", stringify!($type)), align_of::<rust::$type>() as u64),
            )*
            $($(
                (format!("offset {}.{}", stringify!($struct), $c_field),
                 core::mem::offset_of!(rust::$struct, $field $(. $inner)?) as u64),
            )*)*
            $((format!("value {}", stringify!($constant)), rust::$constant as u64),)*
        ];
        // SAFETY: takes nothing and reads a constant.
        assert_eq!(rows.len() as u64, unsafe { cuda_vmm_witness_count() }, "one side has rows that the other lacks");
        let differing: Vec<_> = rows
            .iter()
            .filter(|(name, value)| witness(name) != Some(*value))
            .map(|(name, value)| format!("{name}: Rust {value}, C {:?}", witness(name)))
            .collect();
        assert!(differing.is_empty(), "{differing:#?}");
    }};
}

macro_rules! compare_everything {
    ($module:path) => {
        compare! {
            $module;
            sizes {
                CUresult, CUdevice, CUdeviceptr, CUmemGenericAllocationHandle, CUdevice_attribute, CUmemLocationType, CUmemAllocationType, CUmemAllocationHandleType, CUmemAllocationGranularity_flags, CUmemAccess_flags, CUstreamCaptureStatus, CUstreamCaptureMode, CUstream_flags, CUevent_flags, CUdriverProcAddress_flags, CUmemLocation, CUmemAllocationProp, CUmemAccessDesc, CUuuid
            }
            offsets {
                CUmemLocation: type_ = "type", id = "id";
                CUmemAllocationProp: type_ = "type", requestedHandleTypes = "requestedHandleTypes", location = "location", win32HandleMetaData = "win32HandleMetaData", allocFlags = "allocFlags", allocFlags.compressionType = "allocFlags.compressionType", allocFlags.gpuDirectRDMACapable = "allocFlags.gpuDirectRDMACapable", allocFlags.usage = "allocFlags.usage";
                CUmemAccessDesc: location = "location", flags = "flags";
                CUuuid: bytes = "bytes";
            }
            values {
                CUDA_SUCCESS,
                CUDA_ERROR_INVALID_VALUE,
                CUDA_ERROR_OUT_OF_MEMORY,
                CUDA_ERROR_NOT_INITIALIZED,
                CUDA_ERROR_DEINITIALIZED,
                CUDA_ERROR_STUB_LIBRARY,
                CUDA_ERROR_NO_DEVICE,
                CUDA_ERROR_INVALID_DEVICE,
                CUDA_ERROR_INVALID_CONTEXT,
                CUDA_ERROR_MAP_FAILED,
                CUDA_ERROR_ECC_UNCORRECTABLE,
                CUDA_ERROR_OPERATING_SYSTEM,
                CUDA_ERROR_INVALID_HANDLE,
                CUDA_ERROR_ILLEGAL_STATE,
                CUDA_ERROR_NOT_FOUND,
                CUDA_ERROR_NOT_READY,
                CUDA_ERROR_ILLEGAL_ADDRESS,
                CUDA_ERROR_LAUNCH_TIMEOUT,
                CUDA_ERROR_CONTEXT_IS_DESTROYED,
                CUDA_ERROR_ASSERT,
                CUDA_ERROR_HARDWARE_STACK_ERROR,
                CUDA_ERROR_ILLEGAL_INSTRUCTION,
                CUDA_ERROR_MISALIGNED_ADDRESS,
                CUDA_ERROR_INVALID_ADDRESS_SPACE,
                CUDA_ERROR_INVALID_PC,
                CUDA_ERROR_LAUNCH_FAILED,
                CUDA_ERROR_NOT_PERMITTED,
                CUDA_ERROR_NOT_SUPPORTED,
                CUDA_ERROR_SYSTEM_NOT_READY,
                CUDA_ERROR_SYSTEM_DRIVER_MISMATCH,
                CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
                CUDA_ERROR_STREAM_CAPTURE_INVALIDATED,
                CUDA_ERROR_STREAM_CAPTURE_MERGE,
                CUDA_ERROR_STREAM_CAPTURE_UNMATCHED,
                CUDA_ERROR_STREAM_CAPTURE_UNJOINED,
                CUDA_ERROR_STREAM_CAPTURE_ISOLATION,
                CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
                CUDA_ERROR_CAPTURED_EVENT,
                CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD,
                CUDA_ERROR_UNKNOWN,
                CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
                CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
                CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
                CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED,
                CU_MEM_LOCATION_TYPE_INVALID,
                CU_MEM_LOCATION_TYPE_DEVICE,
                CU_MEM_ALLOCATION_TYPE_INVALID,
                CU_MEM_ALLOCATION_TYPE_PINNED,
                CU_MEM_HANDLE_TYPE_NONE,
                CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                CU_MEM_ALLOC_GRANULARITY_MINIMUM,
                CU_MEM_ALLOC_GRANULARITY_RECOMMENDED,
                CU_MEM_ACCESS_FLAGS_PROT_NONE,
                CU_MEM_ACCESS_FLAGS_PROT_READ,
                CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
                CU_STREAM_CAPTURE_STATUS_NONE,
                CU_STREAM_CAPTURE_STATUS_ACTIVE,
                CU_STREAM_CAPTURE_STATUS_INVALIDATED,
                CU_STREAM_CAPTURE_MODE_GLOBAL,
                CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
                CU_STREAM_CAPTURE_MODE_RELAXED,
                CU_STREAM_DEFAULT,
                CU_STREAM_NON_BLOCKING,
                CU_EVENT_DEFAULT,
                CU_EVENT_DISABLE_TIMING,
                CU_GET_PROC_ADDRESS_DEFAULT,
                CU_GET_PROC_ADDRESS_LEGACY_STREAM
            }
        }
    };
}

#[test]
fn generated_bindings_agree_with_the_header() {
    compare_everything!(cuda_vmm_sys);
}

#[allow(dead_code, unreachable_pub, unused_imports)]
#[path = "../src/declarations.rs"]
mod declarations;
#[allow(unused_imports)]
use cuda_vmm_sys::driver_functions;

#[test]
fn hand_written_declarations_agree_with_the_header() {
    compare_everything!(crate::declarations);
}

#[test]
fn the_witness_answers_only_for_names_it_knows() {
    assert_eq!(witness("size of nothing"), None);
}
