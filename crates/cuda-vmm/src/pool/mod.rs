//! What callers hold: one elastic range, many models under one limit, or the blocks of a paged cache.

pub mod blocks;
mod elastic;
mod pressure;
mod prometheus;
mod quota;
mod shared;
mod snapshot;
mod stats;

pub use crate::size::check_page_bytes;
pub use elastic::VirtualMemoryPool;
pub use prometheus::{PROMETHEUS_CONTENT_TYPE, prometheus};
pub use quota::ModelQuota;
pub use shared::{ModelOptions, SharedMemoryPool, SharedPoolOptions};
pub use snapshot::{ModelSnapshot, Snapshot};
pub use stats::PoolStats;
