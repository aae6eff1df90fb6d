//! A server of several models on one GPU: what is asked of it, which sequences take part in a step, and
//! where blocks of KV come from. Time is simulated, or that of the clock.

pub mod memory;
pub mod request;
pub mod scheduler;
pub mod server;
