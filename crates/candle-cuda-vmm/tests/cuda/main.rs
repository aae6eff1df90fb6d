//! Checks what tensors over memory of a pool rely on in Candle and cudarc, on a CUDA device. The
//! driver is NVIDIA's on a GPU, or the simulator as a `libcuda.so.1` if `cargo xtask test --cuda`
//! runs these programs. The tests need not know which. Simulated devices have no kernels: tests
//! that launch kernels are in the module `kernels`, which that task skips by name. Tests that make
//! calls of the simulated library fail are in the module `simulated`, which the matrix of real
//! drivers skips.
#![cfg(all(feature = "cuda", feature = "simulator"))]

#[path = "../device/bytes.rs"]
mod bytes;
#[path = "../common/mod.rs"]
mod common;

mod copies;
mod dropped;
mod forked;
mod gate;
mod graph;
mod kernels;
mod lease;
mod owners;
mod relief;
mod simulated;
mod streams;
mod token;
mod weights;
