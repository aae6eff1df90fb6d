//! Models that serve: their memory, their prefixes, and their steps.

mod budget;
mod choice;
mod inputs;
mod kv;
mod order;
mod prefix;
mod prompts;
mod runner;
mod sleep;
mod sleeper;
#[cfg(test)]
mod tests;
mod times;
mod upload;

pub use budget::Budget;
pub use choice::Choice;
pub use kv::{BLOCK_TOKENS, Kv, Policy, pool_options};
pub use runner::{HeldBytes, Made, Runner, Stepped};
pub use sleeper::{Kept, Sleeper, is_store_full};
pub use times::StepTimes;
