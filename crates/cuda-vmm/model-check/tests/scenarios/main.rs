//! A model checker's look at what threads do to each other in an engine.
//!
//! With `cfg(model_check)` every lock, wait, wake-up and driver call is a point at which the
//! checker may let another thread go on. Each scenario is run thousands of times, each time in
//! another order; a thread that nothing wakes any more is a failure, and so is any use of the
//! driver that CUDA forbids.

extern crate cuda_vmm_model_check as cuda_vmm;

mod accounts;
mod books;
mod budget;
mod captures;
mod changes;
mod closing;
mod compaction;
mod driver;
mod explore;
mod faults;
mod following;
mod host_store;
mod kept;
mod launches;
mod leases;
#[path = "../../../tests/common/models.rs"]
#[allow(dead_code)]
mod models;
mod neighbours;
mod never_waits;
mod parked;
mod planted;
mod sharing;
mod sleep;
mod waiting;
mod world;
