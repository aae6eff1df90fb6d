//! What callers hold: one elastic range, many models under one limit, or the blocks of a paged cache.

pub mod blocks;
mod elastic;
mod pressure;
mod quota;
mod shared;
mod stats;

pub use elastic::VirtualMemoryPool;
pub use quota::ModelQuota;
pub use shared::{ModelOptions, SharedMemoryPool, SharedPoolOptions};
pub use stats::PoolStats;
