//! The work that is measured.

mod allocation;
mod blocks;
mod bytes;
mod decode;
mod gpu;
mod growth;
mod limits;
mod page;
mod replay;
mod scale;
mod sleep;

use crate::machine::Machine;
use cuda_vmm_benches::Work;

/// All of it, in the order of the figures.
pub const ALL: &[Work<Machine>] = &[
    ("allocate 1 GiB", allocation::one_call),
    ("our own time in allocating", allocation::overhead),
    ("allocate one page from the cache", page::cached),
    ("allocate one parked page", page::parked),
    ("parked pages of several models at a time", page::models),
    ("deallocate 1 GiB", allocation::deallocation),
    ("64 ranges grow at once", growth::measure),
    ("128 sequences grow, serving", decode::measure),
    ("128 sequences over blocks, serving", blocks::measure),
    ("serving replayed, three models", replay::measure),
    (
        "allocate one page while the worker prefetches",
        page::foreground,
    ),
    ("copy within 8 GiB", bytes::copies),
    ("a request that cannot fit", limits::refused),
    ("fill the card until OUT_OF_MEMORY", limits::filled),
    ("tear down 64 GiB", allocation::tear_down),
    ("scrubbing", bytes::scrubbing),
    ("sleep", sleep::measure),
    ("pinned memory", sleep::pinned),
    ("slack", limits::slack),
    ("bookkeeping", limits::bookkeeping),
    ("scale: a refusal is remembered", scale::remembered),
    ("scale: a range is closed", scale::closed),
    ("scale: ranges are dropped", scale::dropped),
    ("scale: a page is taken back", scale::taken_back),
    ("scale: parts are leased", scale::leased),
];
