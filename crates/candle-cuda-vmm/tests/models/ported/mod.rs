//! The models over any cache; see the README.

pub mod gemma3;
pub mod mistral;
pub mod qwen3;
