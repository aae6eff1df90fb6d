//! What tensors over memory of a pool rely on in Candle and cudarc, on a CUDA device.
//!
//! The driver is NVIDIA's on a GPU, or the simulator as a `libcuda.so.1` where `cargo xtask test --cuda` runs
//! these programs; they cannot tell, and need not. Simulated devices have no kernels: what launches some is in
//! the module `kernels`, which that task leaves out by its name. What has calls of the simulated library fail is in the
//! module `simulated`, which the matrix of real drivers leaves out.
#![cfg(all(feature = "cuda", feature = "simulator"))]

#[path = "../device/bytes.rs"]
mod bytes;
#[path = "../common/mod.rs"]
mod common;

mod copies;
mod dropped;
mod forked;
mod gate;
mod kernels;
mod lease;
mod owners;
mod relief;
mod simulated;
mod streams;
mod token;
