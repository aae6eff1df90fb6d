//! Attention that reads K and V in place.
//!
//! On a GPU, Candle's `matmul` does not accept token-major K and V. So models copy both into
//! another order at every step, and repeat each head of K and V for the queries that share it.
//! [`gqa`] avoids both. [`gqa_with`] has options for models with a sliding window or a soft cap.
//!
//! An engine that serves many sequences has their K and V in a [`KvBatch`]: in one tensor, in a
//! cache for each sequence, or in blocks. [`write()`] rotates new tokens and stores them there,
//! [`prompt`] computes the attention of chunks of prompts, and [`decode`] that of one token for
//! each sequence.

mod cpu;
mod cpu_decode;
mod cpu_rows;
mod cpu_write;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "attention")]
pub(crate) mod cuda_addresses;
#[cfg(feature = "attention")]
mod cuda_arguments;
#[cfg(feature = "attention")]
mod cuda_decode;
#[cfg(feature = "attention")]
pub(crate) mod cuda_launch;
#[cfg(feature = "attention")]
mod cuda_plan;
#[cfg(feature = "attention")]
mod cuda_read;
#[cfg(feature = "attention")]
mod cuda_write;
mod decode;
pub(crate) mod element;
mod gqa;
mod kv_batch;
mod kv_check;
mod kv_memory;
mod options;
mod plan;
mod prompt;
mod rotary;
mod sizes;
mod slots;
#[cfg(feature = "cuda")]
mod softmax;
mod span;
pub(crate) mod stream;
mod write;

pub use decode::{decode, decode_into};
pub use gqa::{gqa, gqa_with};
pub use kv_batch::KvBatch;
pub use options::{GqaOptions, Mask};
pub use plan::DecodePlan;
pub use prompt::prompt;
pub use rotary::Rotary;
pub use slots::Slots;
pub use span::PromptSpan;
pub(crate) use stream::is_same_stream;
pub use write::write;
