//! Attention that reads K and V in place.
//!
//! On a GPU, Candle's `matmul` does not accept token-major K and V. So models copy both into
//! another order at every step, and repeat each head of K and V for the queries that share it.
//! [`gqa`] avoids both. [`gqa_with`] has options for models with a sliding window or a soft cap.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod gqa;
mod options;
mod sizes;
#[cfg(feature = "cuda")]
mod softmax;

pub use gqa::{gqa, gqa_with};
pub use options::{GqaOptions, Mask};
