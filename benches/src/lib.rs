//! What the measuring programs share: figures and what is demanded of them, sides that are measured
//! in turns, the report, and the parts of a server that is simulated or replayed.

#![allow(missing_docs, reason = "nothing of it is published")]

mod counting;
#[allow(dead_code)]
#[path = "../../xtask/src/display.rs"]
mod display;
mod drivers;
pub mod figure;
mod models;
pub mod plot;
pub mod program;
pub mod report;
pub mod serving;
mod sides;
mod work;

pub use counting::{Filling, bookkeeping_memory};
pub use drivers::{GRANULARITY, MEMORY_MANAGEMENT, count_of};
pub use drivers::{no_op_driver, noted_calls, noting_driver};
pub use models::{ParkedModels, shared_models, step_until, watch};
pub use sides::{Settings, Sides, drop_time, mean, quantile, time};
pub use work::{Outcome, Work};
