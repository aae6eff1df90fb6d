//! The work that is measured.

mod attention;
mod blocks;
mod captured;
mod decode;
mod decoder;
mod fork;
mod graph;
mod growth;
mod weights;

use crate::machine::Machine;
use cuda_vmm_benches::Work;

/// All of it, in the order of the figures.
pub const ALL: &[Work<Machine>] = &[
    ("append and view", growth::append),
    ("append over an account", growth::account),
    ("memory of the caches", growth::memory),
    ("worst decode step", growth::step),
    ("attention", attention::measure),
    ("decode attention", decode::measure),
    ("whole decoder", decoder::measure),
    ("captured steps", captured::measure),
    ("make and drop a view", growth::view),
    ("one range", growth::one_range),
    ("blocks", blocks::measure),
    ("fork", fork::measure),
    ("load weights", weights::load),
    ("sleeping models", weights::switch),
];
