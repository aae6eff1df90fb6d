//! Raw bindings to the part of the CUDA driver interface that manages virtual memory.
//!
//! Types, constants and function-pointer types come from the `cuda.h` and `cudaTypedefs.h` found
//! when the crate is built. Nothing is linked: [`load`] opens `libcuda.so.1` at run time and fills a
//! [`DriverTable`] through `cuGetProcAddress`. A simulated driver fills the same table.
//!
//! There is nothing safe and nothing clever here; `cuda-vmm` is the safe layer. Documentation builds
//! and targets other than Linux have no `cuda.h`: there a small set of declarations written by hand
//! takes its place, which a test compares with the header.
//!
//! Which calls are in the table is decided in one place, [`driver_functions!`].

mod functions;
mod load;
mod table;

#[cfg(cuda_vmm_sys_declared)]
mod declarations;
#[cfg(cuda_vmm_sys_declared)]
pub use declarations::*;

#[cfg(not(cuda_vmm_sys_declared))]
#[allow(
    missing_docs,
    non_camel_case_types,
    non_upper_case_globals,
    non_snake_case,
    unreachable_pub,
    clippy::all,
    clippy::undocumented_unsafe_blocks
)]
mod bindings {
    include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
}
#[cfg(not(cuda_vmm_sys_declared))]
pub use bindings::*;

/// `cuCtxRecordEvent`, which headers before 12.5 do not declare.
#[cfg(not(cuda_vmm_sys_declared))]
#[allow(non_camel_case_types)]
pub type PFN_cuCtxRecordEvent_v12050 =
    Option<unsafe extern "C" fn(context: CUcontext, event: CUevent) -> CUresult>;

pub use load::{DRIVER_PATH_VARIABLE, LoadError, load, load_from};
pub use table::{DriverFunction, DriverTable};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
