//! A small server of language models that share a GPU's memory, and speak OpenAI's HTTP API. It is
//! there to prove the library under real work; it is no product.
//!
//! [`request`] is what the parts agree on. [`api`] turns HTTP into a [`Generate`](request::Generate)
//! for a [`Backend`](request::Backend), and the events that come of it into a response. [`text`] is
//! all that has to do with letters: tokens, chat templates and stop strings. [`host`] is the backend:
//! several models, each with an [`engine`] on a thread of its own, whose steps the [`scheduler`]
//! plans. [`figures`] are what it says of their memory and work.

#![deny(unsafe_code)]

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

pub mod api;
pub mod engine;
pub mod figures;
pub mod host;
pub mod request;
pub mod scheduler;
pub mod text;
