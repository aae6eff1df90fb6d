//! What launches Candle's kernels on a CUDA device: `cargo xtask test --cuda` leaves this module out by its name.

mod append;
mod attention;
mod blocks;
mod factory;
