//! Workload (c): idle models beside one busy one.

use super::{Course, demand, never_slower, p99_ms};
use crate::arrivals::{PHASES, paced};
use crate::contest::{Contest, Pool, Sizes};
use crate::demand::{Finding, Reach};
use crate::work::ramps::SIZES;
use crate::workload::Workload;
use anyhow::Result;

/// Models that have served a few requests and are idle then.
const IDLE: usize = 7;
/// How long after one idle model the next has its requests, in seconds.
const APART_SECONDS: u64 = 3;
/// Requests a second, in each second of an idle model.
const IDLE_RATES: [u32; 3] = [4, 4, 4];
/// Requests a second of the busy model, somewhat less than the card computes.
const BUSY_RATE: u32 = 9;
/// How long it is busy.
const BUSY_SECONDS: usize = 60;

const SECOND_NS: u64 = 1_000_000_000;

/// Simulates them, the busy model after the idle ones.
///
/// # Errors
/// If a pool fails.
pub fn hold(course: &Course) -> Result<Contest> {
    let (phases, seconds) = if course.quick {
        (1, 10)
    } else {
        (PHASES, BUSY_SECONDS)
    };
    let variants = (0..phases).map(|phase| {
        let idle = (0..IDLE as u64).map(|model| {
            paced(
                model * APART_SECONDS * SECOND_NS,
                phase,
                IDLE_RATES.into_iter(),
            )
        });
        let from_ns = IDLE as u64 * APART_SECONDS * SECOND_NS;
        let busy = paced(from_ns, phase, std::iter::repeat_n(BUSY_RATE, seconds));
        Workload {
            models: idle.chain([busy]).collect(),
        }
    });
    let sizes = Sizes {
        static_tokens: SIZES.shared_tokens / (IDLE + 1),
        ..SIZES
    };
    let name = format!("(c) {IDLE} idle models and a busy one");
    Contest::hold(&name, &variants.collect::<Vec<_>>(), sizes)
}

/// Judges them.
pub fn judge(course: &Course, contest: &Contest) -> Vec<Finding> {
    let mut findings = never_slower(course, contest);
    let ours = p99_ms(contest, Pool::Ours);
    for pool in [Pool::StaticSplit, Pool::Ideal] {
        let name = format!("{}: p99 time to first token: {}", contest.name, pool.name());
        let demand = demand(name, "ms", Reach::Open);
        findings.push(demand.judge(ours, Some(p99_ms(contest, pool))));
    }
    findings
}
