//! The work that is measured.

mod attention;
mod blocks;
mod decoder;
mod growth;

use crate::machine::Machine;
use cuda_vmm_benches::Work;

/// All of it, in the order of the figures.
pub const ALL: &[Work<Machine>] = &[
    Work::new("append and view", growth::append),
    Work::new("memory of the caches", growth::memory),
    Work::new("worst decode step", growth::step),
    Work::new("attention", attention::measure),
    Work::new("whole decoder", decoder::measure),
    Work::new("make and drop a view", growth::view),
    Work::new("blocks", blocks::measure),
];
