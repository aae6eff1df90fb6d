//! Tests that launch Candle's kernels on a CUDA device: `cargo xtask test --cuda` skips this module
//! by name.

mod allocator;
mod append;
mod attention;
mod batch;
mod blocks;
mod factory;
mod fork;
mod fused;
mod graph;
mod layers;
mod linear;
mod positions;
mod rotating;
mod sample;
mod sequence;
mod weights;
mod windows;
