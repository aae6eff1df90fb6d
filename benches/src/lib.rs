//! What the measuring programs share: figures and what is demanded of them, sides that are measured
//! in turns, the report, and the parts of a server that is simulated or replayed.

mod counting;
pub mod figure;
mod no_op;
mod parked;
pub mod program;
pub mod report;
mod samples;
pub mod serving;
mod shared;
mod sides;
mod work;

pub use counting::{CountingAllocator, Filling, bookkeeping_memory};
pub use no_op::{GRANULARITY, no_op_driver};
pub use parked::ParkedModels;
pub use samples::Samples;
pub use shared::{SharedSizes, model_name, shared_models};
pub use sides::{Settings, Sides, time};
pub use work::{Outcome, Work};
