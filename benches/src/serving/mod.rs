//! A server of several models on one GPU: what is asked of it, which sequences take part in a step,
//! and where blocks of KV come from. Time is simulated, or that of the clock.

mod counted;
mod memory;
mod request;
mod server;

pub use counted::Counted;
pub use memory::*;
pub use request::*;
pub use server::{Limits, Moment, Served, Server};
