//! The function-pointer types of `cudaTypedefs.h`, from the one list of calls.

#![allow(non_camel_case_types, missing_docs)]

use crate::*;
use core::ffi::{c_char, c_int, c_uchar, c_uint, c_ulonglong, c_void};

/// The version of CUDA 11.3, which looks up all other functions.
pub type PFN_cuGetProcAddress_v11030 =
    Option<unsafe extern "C" fn(*const c_char, *mut *mut c_void, c_int, c_ulonglong) -> CUresult>;

macro_rules! declare {
    (
        required { $(fn $name:ident($($argument:ident: $type:ty),*) = $pfn:ident, $version:literal;)* }
        optional { $(fn $optional:ident($($optional_argument:ident: $optional_type:ty),*) = $optional_pfn:ident, $optional_version:literal;)* }
    ) => {
        $(pub type $pfn = Option<unsafe extern "C" fn($($argument: $type),*) -> CUresult>;)*
        $(pub type $optional_pfn = Option<unsafe extern "C" fn($($optional_argument: $optional_type),*) -> CUresult>;)*
    };
}
crate::driver_functions!(declare);
