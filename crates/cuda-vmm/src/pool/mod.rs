//! What callers hold: one elastic range, many models under one limit, or the blocks of a paged
//! cache.

pub mod blocks;
mod elastic;
mod fill;
mod many;
mod prefetch;
mod prometheus;
mod shared;
mod sharing;
mod sleep;
mod snapshot;
mod stats;
mod waiting;

pub use crate::size::check_page_bytes;
pub use elastic::VirtualMemoryPool;
pub use many::{Backed, PoolPart, Turn};
pub use prometheus::{PROMETHEUS_CONTENT_TYPE, prometheus};
pub use shared::{SharedMemoryPool, SharedPoolOptions};
pub use sharing::{Shared, SharedPart};
pub use sleep::{Arriving, WakeOptions};
pub use snapshot::{AccountSnapshot, Snapshot};
pub use stats::PoolStats;
pub use waiting::Allocation;
