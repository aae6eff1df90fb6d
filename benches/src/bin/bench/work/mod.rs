//! The work that is measured.

mod allocation;
mod bytes;
mod cache;
mod decode;
mod growth;
mod limits;
mod page;
mod replay;

use crate::machine::Machine;
use cuda_vmm_benches::work::Work;

/// All of it, in the order of the figures.
pub const ALL: &[Work<Machine>] = &[
    allocation::ONE_CALL,
    allocation::OVERHEAD,
    page::CACHED,
    page::PARKED,
    page::MODELS,
    allocation::DEALLOCATION,
    growth::WORK,
    decode::WORK,
    replay::WORK,
    page::FOREGROUND,
    bytes::COPIES,
    limits::REFUSED,
    limits::FILLED,
    allocation::TEAR_DOWN,
    bytes::SCRUBBING,
    limits::SLACK,
    limits::BOOKKEEPING,
];
