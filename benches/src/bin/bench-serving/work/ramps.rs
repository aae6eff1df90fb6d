//! Workload (a): three models whose ramps hardly overlap, as KVCached published it.

use super::{Course, demand, never_slower, p99_ms};
use crate::arrivals::{PHASES, staggered_ramps};
use crate::contest::{Contest, Pool, Sizes};
use crate::demand::{Finding, Reach};
use crate::published::{CURVES, Point};
use crate::workload::Workload;
use anyhow::{Context, Result};

/// Models on the card.
pub const MODELS: u32 = 3;
/// As published: 0.31 of the card less weights and activations for each model, or all of it shared.
pub const SIZES: Sizes = Sizes {
    static_tokens: 62_000,
    shared_tokens: 213_000,
};
/// What ours may take of the ideal pool's time.
const IDEAL_TIMES: f64 = 1.02;
/// What ours may take of the static split's time where memory is not short.
const STATIC_TIMES: f64 = 1.005;
/// Peaks at which it is not.
const AMPLE_PEAKS: [u32; 2] = [12, 14];
/// How much faster than the static split ours must be at its best peak, where the ideal pool is.
const BEST_TIMES: f64 = 28.0;

/// What came of each peak.
pub type Ramps = Vec<(Point, Contest)>;

/// Simulates all peaks, each with requests at several places within their share of a second.
///
/// # Errors
/// If a pool fails.
pub fn hold(course: &Course) -> Result<Ramps> {
    let phases = if course.quick { 1 } else { PHASES };
    let contests = CURVES.iter().map(|point| {
        let variants = (0..phases).map(|phase| Workload {
            models: staggered_ramps(MODELS, point.peak, phase),
        });
        let variants: Vec<_> = variants.collect();
        let name = format!("(a) peak {}", point.peak);
        Ok((*point, Contest::hold(&name, &variants, SIZES)?))
    });
    contests.collect()
}

/// Judges them.
///
/// # Errors
/// If there are none.
pub fn judge(course: &Course, ramps: &Ramps) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for (point, contest) in ramps {
        let ours = p99_ms(contest, Pool::Ours);
        let against = |pool: Pool, reach| {
            let name = format!("{}: p99 time to first token: {}", contest.name, pool.name());
            course.judge(
                &demand(name, "ms", reach),
                ours,
                Some(p99_ms(contest, pool)),
            )
        };
        findings.push(against(Pool::Ideal, Reach::AtMostTimes(IDEAL_TIMES)));
        let is_ample = AMPLE_PEAKS.contains(&point.peak);
        let reach = if is_ample {
            Reach::AtMostTimes(STATIC_TIMES)
        } else {
            Reach::Open
        };
        findings.push(against(Pool::StaticSplit, reach));
        findings.extend(never_slower(course, contest));
    }
    findings.push(best(course, ramps)?);
    for (point, contest) in ramps {
        for (curve, pool, published_ms) in [
            ("static", Pool::StaticSplit, point.static_ms),
            ("KVCached", Pool::PageAtATime, point.elastic_ms),
        ] {
            let name = format!(
                "(a) peak {}: simulated {}: published {curve}",
                point.peak,
                pool.name()
            );
            let simulated_ms = p99_ms(contest, pool);
            findings.push(demand(name, "ms", Reach::Open).judge(simulated_ms, Some(published_ms)));
        }
    }
    Ok(findings)
}

/// The peak at which the static split is the farthest behind.
fn best(course: &Course, ramps: &Ramps) -> Result<Finding> {
    let times =
        |contest: &Contest, pool| p99_ms(contest, Pool::StaticSplit) / p99_ms(contest, pool);
    let farthest = |pool| {
        let peaks = ramps
            .iter()
            .map(move |(point, contest)| (times(contest, pool), point.peak));
        peaks
            .max_by(|one, other| one.0.total_cmp(&other.0))
            .context("no peaks")
    };
    let ((ours, peak), (ideal, ideal_peak)) = (farthest(Pool::Ours)?, farthest(Pool::Ideal)?);
    let reach = match ideal >= BEST_TIMES {
        true => Reach::AtLeastTimes(BEST_TIMES),
        false => Reach::Open,
    };
    let contest = ramps
        .iter()
        .find(|(point, _)| point.peak == peak)
        .map(|(_, contest)| contest);
    let contest = contest.context("no peaks")?;
    // Turned round, as a static split that is so many times slower is what is demanded.
    let demand = demand(
        "(a) best peak: p99 time to first token of the static split: of ours".to_owned(),
        "ms",
        reach,
    );
    let mut finding = course.judge(
        &demand,
        p99_ms(contest, Pool::StaticSplit),
        Some(p99_ms(contest, Pool::Ours)),
    );
    let note = format!(
        "static ÷ ours is {ours:.1} at peak {peak}; static ÷ ideal {ideal:.1} at peak {ideal_peak}; KVCached published 28.2 at 16"
    );
    finding.note = Some(match finding.note {
        Some(before) => format!("{note}; {before}"),
        None => note,
    });
    Ok(finding)
}
