//! Workload (a): three models whose ramps hardly overlap, as KVCached published it.

use crate::contest::{Contest, Pool};
use anyhow::{Context, Result};
use cuda_vmm_benches::Outcome;
use cuda_vmm_benches::serving::{PHASES, staggered_ramps};
use serde::Deserialize;

pub const MODELS: u32 = 3;
/// Tokens of KV of each in the static split, as published: 0.31 of what weights leave of the card.
pub const STATIC_TOKENS: usize = 62_000;
/// The work of the peak at which the static split is the farthest behind.
pub const BEST: &str = "(a) best peak";
/// How much faster than the static split ours must be at its best peak, if the ideal pool is.
const BEST_TIMES: f64 = 28.0;

/// One peak of the curves that KVCached published: p99 time to first token.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct Point {
    /// Requests a second at the top of each ramp.
    pub peak: u32,
    pub static_ms: f64,
    /// With KVCached.
    pub elastic_ms: f64,
}

/// Three 8B models on one 80 GB A100.
pub fn curves() -> Result<Vec<Point>> {
    let text = include_str!("../../../figures/kvcached.csv");
    let points = csv::Reader::from_reader(text.as_bytes()).into_deserialize();
    Ok(points.collect::<Result<_, _>>()?)
}

pub type Ramps = Vec<(Point, Contest)>;

/// Simulates all peaks, each with requests at several places within their share of a second.
pub fn hold(quick: bool) -> Result<Ramps> {
    let phases = if quick { 1 } else { PHASES };
    let contests = curves()?.into_iter().map(|point| {
        let variants = (0..phases).map(|phase| staggered_ramps(MODELS, point.peak, phase));
        let name = format!("(a) peak {}", point.peak);
        Ok((point, Contest::hold(&name, STATIC_TOKENS, variants)?))
    });
    contests.collect()
}

/// Tells what was published, and the best peak; returns whether that one is to be judged.
pub fn tell(ramps: &Ramps, outcome: &mut Outcome) -> Result<bool> {
    for (point, Contest { name, .. }) in ramps {
        let published = [("static", point.static_ms), ("KVCached", point.elastic_ms)];
        for (whose, ms) in published {
            outcome.count(&format!("{name}: published {whose}"), ms * 1e6);
        }
    }
    let farthest = |pool| {
        let times = |one: &Contest| one.p99_ms(Pool::StaticSplit) / one.p99_ms(pool);
        let peaks = ramps.iter();
        let peaks = peaks.map(|(point, one)| (times(one), point.peak, one));
        let farthest = peaks.max_by(|one, other| one.0.total_cmp(&other.0));
        farthest.context("no peaks")
    };
    let (ours, peak, contest) = farthest(Pool::Ours)?;
    let (ideal, ideal_peak, _) = farthest(Pool::Ideal)?;
    // Turned round, as a static split that is this many times slower is what is demanded.
    for pool in [Pool::StaticSplit, Pool::Ours] {
        let ns = contest.p99_ms(pool) * 1e6;
        outcome.count(&format!("{BEST}: {}", pool.name()), ns);
    }
    let note = format!(
        "static ÷ ours is {ours:.1} at peak {peak}; static ÷ ideal {ideal:.1} at peak {ideal_peak}; \
         KVCached published 28.2 at 16"
    );
    outcome.note(&format!("{BEST}: static split"), note);
    Ok(ideal >= BEST_TIMES)
}
