//! Raw bindings to the part of the CUDA driver interface that manages virtual memory.
//!
//! Nothing is linked: [`load`] opens `libcuda.so.1` at run time and fills a [`DriverTable`] through
//! `cuGetProcAddress`. A simulated driver fills the same table. There is nothing safe and nothing clever here;
//! `cuda-vmm` is the safe layer.
//!
//! Which calls are in the table is decided in one place, [`driver_functions!`].
//!
//! # Features
//! - `bindgen` (on by default): types and constants come from the `cuda.h` and `cudaTypedefs.h` found when the crate is
//!   built, and the build fails if a value or a call of theirs is not what this crate says. It needs both headers and
//!   libclang.
//!
//! Without it they are declared by hand, and the build needs nothing but Rust. The names are the same, whatever the
//! header and with the feature or without it, and a test compares the declarations with six CUDA releases. Documentation
//! builds and targets other than Linux use them too.

#![cfg_attr(docsrs, feature(doc_cfg))]

// Not every list is needed in each kind of build.
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
