//! The models as they are in candle-transformers; see the README.

pub mod gemma3;
pub mod mistral;
pub mod qwen3;
