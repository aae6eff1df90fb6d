//! The work that is measured: a file for each kind.

mod append;
mod attention;
mod blocks;
mod decoder;
// The pools use more of it.
#[allow(dead_code)]
#[path = "../../bench/work/kind.rs"]
mod kind;
mod memory;
mod step;
mod view;

pub use kind::{Outcome, Work};

/// All of it.
pub const ALL: &[Work] = &[
    append::WORK,
    memory::WORK,
    step::WORK,
    attention::WORK,
    decoder::WORK,
    view::WORK,
    blocks::WORK,
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_figure_has_a_name_of_its_own() {
        let demands = ALL.iter().flat_map(|work| work.demands);
        let names: Vec<_> = demands.map(|demand| demand.name).collect();
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
    }
}
