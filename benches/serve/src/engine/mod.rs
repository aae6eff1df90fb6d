//! Models that serve: their memory, their prefixes, and their steps.

mod inputs;
mod kv;
mod prefix;
mod runner;
#[cfg(test)]
mod tests;

pub use kv::{BLOCK_TOKENS, Kv, Policy};
pub use runner::{Made, Runner};
