//! The work that is measured: a file for each kind.

mod bookkeeping;
mod copies;
mod deallocation;
mod foreground;
mod growth;
mod kind;
mod limits;
mod models;
mod one_shot;
mod page;
mod scrub;
mod serving;
mod slack;
mod tear_down;

pub use kind::{Outcome, Work};
pub use serving::ReplaySettings;

/// All of it.
pub const ALL: &[Work] = &[
    one_shot::WORK,
    one_shot::OVERHEAD,
    page::CACHED,
    page::PARKED,
    models::WORK,
    deallocation::WORK,
    growth::WORK,
    serving::DECODE,
    serving::REPLAY,
    foreground::WORK,
    copies::WORK,
    limits::REFUSED,
    limits::FILLED,
    tear_down::WORK,
    scrub::WORK,
    slack::WORK,
    bookkeeping::WORK,
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_figure_has_a_name_of_its_own() {
        let names: Vec<_> = ALL
            .iter()
            .flat_map(|work| work.demands)
            .map(|demand| demand.name)
            .collect();
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
    }

    #[test]
    fn where_nothing_can_be_measured_every_figure_is_reported_without_a_verdict() {
        for work in ALL {
            let findings = work.unmeasured("no GPU");
            assert_eq!(findings.len(), work.demands.len());
            assert!(findings.iter().all(|finding| finding.pass.is_none()));
        }
    }

    #[test]
    fn words_find_work_by_its_figures_too() {
        assert!(one_shot::WORK.is_meant_by("1 GiB"));
        assert!(!one_shot::WORK.is_meant_by("tear down"));
    }
}
