//! A server of language models that share a GPU's memory. It is there to prove the library under
//! real work; it is no product.

// The decoder is that of the facade's example, which also has what is not needed here.
#[allow(dead_code)]
#[path = "../../../crates/candle-cuda-vmm/examples/generate"]
mod generate {
    pub mod batch;
    pub mod config;
    pub mod model;
    pub mod weights;
}
use generate::{batch, config, model, weights};

pub mod engine;
pub mod scheduler;
