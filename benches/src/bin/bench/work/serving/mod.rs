//! What the pool adds to the steps of a server: a step of a model takes blocks for its tokens, and those of sequences that have
//! ended go back.

mod arrivals;
mod cache;
mod decode;
mod replay;
mod scheduler;
mod settings;

pub use decode::WORK as DECODE;
pub use replay::WORK as REPLAY;
pub use settings::ReplaySettings;

/// The keys and values of a token of the models in question, in bytes: 8B, 32 layers of 8 heads of 128 numbers of two bytes.
const TOKEN_BYTES: usize = 131_072;
