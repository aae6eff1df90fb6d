//! Declarations written by hand, for builds without `cuda.h`.
//!
//! They cover what the driver table and its callers use. `tests/layout.rs` compares every size,
//! offset and value with the C compiler's view of the header.

#![allow(non_camel_case_types, non_snake_case, missing_docs)]

use core::ffi::{c_char, c_int, c_uchar, c_uint, c_ushort, c_void};

pub type CUresult = c_uint;
pub type CUdevice_attribute = c_uint;
pub type CUmemLocationType = c_uint;
pub type CUmemAllocationType = c_uint;
pub type CUmemAllocationHandleType = c_uint;
pub type CUmemAllocationGranularity_flags = c_uint;
pub type CUmemAccess_flags = c_uint;
pub type CUstreamCaptureStatus = c_uint;
pub type CUstreamCaptureMode = c_uint;
pub type CUstream_flags = c_uint;
pub type CUevent_flags = c_uint;
pub type CUgraphNodeType = c_uint;
pub type CUgraphMem_attribute = c_uint;
pub type CUgraphInstantiate_flags = c_uint;
pub type CUdriverProcAddress_flags = c_uint;

macro_rules! declare_constants {
    ($($name:ident: $type:ident = $value:literal;)*) => {
        $(pub const $name: $type = $value;)*
    };
}
constants!(declare_constants);

pub type CUdevice = c_int;
pub type CUdeviceptr = u64;
pub type CUmemGenericAllocationHandle = u64;
pub type CUhostFn = Option<unsafe extern "C" fn(user_data: *mut c_void)>;

macro_rules! declare_handles {
    ($($pointer:ident = $pointee:ident;)*) => {$(
        #[repr(C)]
        #[derive(Debug, Clone, Copy)]
        pub struct $pointee {
            _unused: [u8; 0],
        }
        pub type $pointer = *mut $pointee;
    )*};
}
handles!(declare_handles);

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct CUuuid {
    pub bytes: [c_char; 16],
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct CUmemLocation {
    pub type_: CUmemLocationType,
    pub id: c_int,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct CUmemAllocationProp {
    pub type_: CUmemAllocationType,
    pub requestedHandleTypes: CUmemAllocationHandleType,
    pub location: CUmemLocation,
    pub win32HandleMetaData: *mut c_void,
    pub allocFlags: CUmemAllocationProp_st__bindgen_ty_1,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct CUmemAllocationProp_st__bindgen_ty_1 {
    pub compressionType: c_uchar,
    pub gpuDirectRDMACapable: c_uchar,
    pub usage: c_ushort,
    pub reserved: [c_uchar; 4],
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct CUmemAccessDesc {
    pub location: CUmemLocation,
    pub flags: CUmemAccess_flags,
}
