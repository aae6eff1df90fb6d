//! Attention over K and V where they stand.
//!
//! Candle's `matmul` refuses token-major K and V on a GPU, so models copy them into another order at every
//! step, and repeat each head of K and V for the queries that share it. [`gqa`] does neither.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod gqa;
mod sizes;
#[cfg(feature = "cuda")]
mod softmax;

pub use gqa::gqa;
