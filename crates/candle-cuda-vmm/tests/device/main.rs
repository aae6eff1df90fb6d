//! The facade on one device: a GPU, or the CPU device over the simulated driver. The same cases for
//! both; `CUDA_VMM_TEST_DRIVER` chooses.
#![cfg(feature = "simulator")]

#[path = "../common/mod.rs"]
mod common;

mod elastic;
mod mapping;
mod memory;
mod raw;
mod shared;
