#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]
#![deny(unsafe_code)]

mod books;
#[allow(unsafe_code)]
mod calls;
mod capture;
mod config;
mod context;
mod cost;
mod device;
mod error_names;
mod event;
mod fault;
mod graph;
mod graph_memory;
#[allow(unsafe_code)]
mod host_memory;
#[allow(unsafe_code)]
mod interposer;
mod launch;
#[allow(unsafe_code)]
mod location;
mod memory;
mod registration;
mod simulator;
#[allow(unsafe_code)]
mod slot;
mod state;
mod stream;
mod thread;
#[allow(unsafe_code)]
mod work;
mod worker;

pub use books::Books;
pub use config::SimConfig;
pub use cost::CostModel;
pub use fault::Fault;
pub use interposer::Interposer;
pub use simulator::{SimError, Simulator};
