//! Four pools of blocks.

pub mod counted;
pub mod elastic;
pub mod page_at_a_time;
