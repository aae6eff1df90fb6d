//! What callers hold: one elastic range, or many models under one limit.

mod elastic;
mod shared;
mod stats;

pub use elastic::VirtualMemoryPool;
pub use shared::{ModelOptions, SharedMemoryPool, SharedPoolOptions};
pub use stats::PoolStats;
