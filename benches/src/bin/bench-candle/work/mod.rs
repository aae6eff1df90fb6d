//! The work that is measured.

mod attention;
mod blocks;
mod decoder;
mod growth;

use crate::machine::Machine;
use cuda_vmm_benches::work::Work;

/// All of it, in the order of the figures.
pub const ALL: &[Work<Machine>] = &[
    growth::APPEND,
    growth::MEMORY,
    growth::STEP,
    attention::WORK,
    decoder::WORK,
    growth::VIEW,
    blocks::WORK,
];
