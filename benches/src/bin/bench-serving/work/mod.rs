//! What is simulated: a file for each workload, which holds its contest and judges it.

pub mod hand_back;
pub mod idle;
pub mod ramps;
pub mod single;
pub mod traces;

use crate::contest::{Contest, Pool};
use crate::demand::{Demand, Finding, Reach};
use crate::outcome::Outcome;

/// What all workloads are run with.
#[derive(Clone, Copy, Debug)]
pub struct Course {
    /// Whether only to show that everything runs.
    pub quick: bool,
}

impl Course {
    /// Judges a figure; in a quick run it is told and not judged.
    pub fn judge(&self, demand: &Demand, ours: f64, peer: Option<f64>) -> Finding {
        let finding = demand.judge(ours, peer);
        match self.quick {
            false => finding,
            true => Finding {
                pass: None,
                note: Some("a quick run is not judged".to_owned()),
                ..finding
            },
        }
    }
}

/// A demand whose name is made while running. Each is made once in the life of the program.
fn demand(name: String, unit: &'static str, reach: Reach) -> Demand {
    Demand::time(name.leak(), unit, reach)
}

/// A figure of an outcome, with its name.
type Figure = (&'static str, fn(&Outcome) -> f64);

/// In which ours must never be slower than the page-at-a-time pool.
const NEVER_SLOWER: [Figure; 3] = [
    ("mean time to first token", |outcome| {
        outcome.first_token.mean_ms()
    }),
    ("p99 time to first token", |outcome| {
        outcome.first_token.percentile_ms(99)
    }),
    ("mean time per token", |outcome| outcome.per_token.mean_ms()),
];

/// Ours against the page-at-a-time pool.
fn never_slower(course: &Course, contest: &Contest) -> Vec<Finding> {
    let figures = NEVER_SLOWER.iter().map(|(figure, of)| {
        let name = format!("{}: {figure}: page at a time", contest.name);
        let demand = demand(name, "ms", Reach::AtMostTimes(1.0));
        let of = |pool| of(contest.of(pool));
        course.judge(&demand, of(Pool::Ours), Some(of(Pool::PageAtATime)))
    });
    figures.collect()
}

fn p99_ms(contest: &Contest, pool: Pool) -> f64 {
    contest.of(pool).first_token.percentile_ms(99)
}
