//! Raw bindings to the part of the CUDA driver interface that manages virtual memory.
//!
//! Nothing is linked: [`load`] opens `libcuda.so.1` at run time and fills a [`DriverTable`] through
//! `cuGetProcAddress`. A simulated driver fills the same table. This crate has no safe wrappers;
//! `cuda-vmm` is the safe layer.
//!
//! [`driver_functions!`] is the one list of the calls in the table.
//!
//! # Features
//! - `bindgen` (on by default): types and constants come from the `cuda.h` and `cudaTypedefs.h`
//!   that are found when the crate is built. The build fails if a value or a call in them differs
//!   from this crate's. It needs both headers and libclang.
//!
//! Without the feature they are declared by hand, and the build needs Rust only. The names are the
//! same with every header, with the feature and without it. A test compares the declarations with
//! six CUDA releases. Documentation builds and targets other than Linux always use them.

#![cfg_attr(docsrs, feature(doc_cfg))]

// Some lists are unused in some kinds of build.
#[allow(unused_macros)]
#[macro_use]
mod names;
mod function_types;
mod functions;
mod load;
mod table;

#[cfg(cuda_vmm_sys_declared)]
mod declarations;
#[cfg(not(cuda_vmm_sys_declared))]
mod generated;

#[cfg(cuda_vmm_sys_declared)]
pub use declarations::*;
pub use function_types::*;
#[cfg(not(cuda_vmm_sys_declared))]
pub use generated::*;
pub use load::{DRIVER_PATH_VARIABLE, LoadError, load, load_from};
pub use table::{DriverFunction, DriverTable};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
