//! Two elastic pools of blocks.

pub mod elastic;
pub mod page_at_a_time;
