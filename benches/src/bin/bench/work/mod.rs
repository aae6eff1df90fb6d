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
use cuda_vmm_benches::Work;

/// All of it, in the order of the figures.
pub const ALL: &[Work<Machine>] = &[
    Work::new("allocate 1 GiB", allocation::one_call),
    Work::new("our own time in allocating", allocation::overhead),
    Work::new("allocate one page from the cache", page::cached),
    Work::new("allocate one parked page", page::parked),
    Work::new("parked pages of several models at a time", page::models),
    Work::new("deallocate 1 GiB", allocation::deallocation),
    Work::new("64 ranges grow at once", growth::measure),
    Work::new("128 sequences grow, serving", decode::measure),
    Work::new("serving replayed, three models", replay::measure),
    Work::new(
        "allocate one page while the worker prefetches",
        page::foreground,
    ),
    Work::new("copy within 8 GiB", bytes::copies),
    Work::new("a request that cannot fit", limits::refused),
    Work::new("fill the card until OUT_OF_MEMORY", limits::filled),
    Work::new("tear down 64 GiB", allocation::tear_down),
    Work::new("scrubbing", bytes::scrubbing),
    Work::new("slack", limits::slack),
    Work::new("bookkeeping", limits::bookkeeping),
];
