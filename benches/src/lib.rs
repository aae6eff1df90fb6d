//! What the measuring programs share: figures and what is demanded of them, sides that are measured in
//! turns, the report, and the parts of a server that is simulated or replayed.

mod counting;
pub mod figure;
mod no_op;
mod parked;
pub mod program;
pub mod report;
pub mod samples;
pub mod serving;
mod shared;
pub mod sides;
pub mod work;

pub use counting::{CountingAllocator, Filling, bookkeeping_memory};
pub use no_op::{GRANULARITY, no_op_driver};
pub use parked::ParkedModels;
pub use shared::{SharedSizes, model_name, shared_models};
