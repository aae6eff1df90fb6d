//! Finding the constants of the time model.
//!
//! The pair with the least sum, over the peaks of the published static curve, of the squared
//! logarithms of simulated to published p99 time to first token: on a coarse grid, then a fine one.

use crate::ramps::{MODELS, Point, STATIC_TOKENS, curves};
use crate::time_model::TimeModel;
use anyhow::{Context, Result};
use cuda_vmm_benches::quantile;
use cuda_vmm_benches::serving::*;
use std::ops::RangeInclusive;

/// By how much the two constants, a step's and a sequence's, are apart in the grids, in nanoseconds.
const COARSE: [usize; 2] = [2_000_000, 20_000];
const FINE: [usize; 2] = [250_000, 5_000];

/// For each peak, variants of the requests of all models: those of every second phase.
type Ramps = [(Point, Vec<Vec<Vec<Request>>>)];

/// The sum of squared logarithms, the constants that it comes of, and the p99 at each peak.
type Try = (f64, TimeModel, Vec<f64>);

/// The static curve with these constants.
fn attempt(ramps: &Ramps, time: TimeModel) -> Result<Try> {
    let step = |prompt, decodes| time.step(prompt, decodes);
    let (mut error, mut p99_ms) = (0.0, Vec::new());
    for (point, variants) in ramps {
        let mut served = Served::default();
        for models in variants {
            let mut memory = Counted::split(blocks_within(STATIC_TOKENS), models.len());
            let limits = Limits::DEFAULT;
            Server::new(models, &mut memory, limits, &step, &mut served).run(u64::MAX)?;
        }
        let ms = quantile(&served.first_token, 990) / 1e6;
        error += (ms / point.static_ms).ln().powi(2);
        p99_ms.push(ms);
    }
    Ok((error, time, p99_ms))
}

fn search(ramps: &Ramps, ranges: [RangeInclusive<u64>; 2], apart: [usize; 2]) -> Result<Try> {
    let [steps, sequences] = ranges;
    let pairs = steps.step_by(apart[0]).flat_map(|step_ns| {
        let sequences = sequences.clone().step_by(apart[1]);
        sequences.map(move |sequence_ns| TimeModel {
            step_ns,
            sequence_ns,
        })
    });
    let tries = pairs.map(|time| attempt(ramps, time));
    let tries = tries.collect::<Result<Vec<_>>>()?.into_iter();
    let best = tries.min_by(|one, other| one.0.total_cmp(&other.0));
    best.context("an empty grid")
}

pub fn run() -> Result<()> {
    let phases = || (0..PHASES).step_by(2);
    let variants = |peak| phases().map(move |phase| staggered_ramps(MODELS, peak, phase));
    let with_variants = |point: Point| (point, variants(point.peak).collect());
    let ramps: Vec<_> = curves()?.into_iter().map(with_variants).collect();
    let (_, coarse, _) = search(&ramps, [10_000_000..=40_000_000, 0..=300_000], COARSE)?;
    // Around the best, as far as the coarse grid's step.
    let around = |value: u64, apart: u64| value.saturating_sub(apart)..=value + apart;
    let steps = around(coarse.step_ns, COARSE[0] as u64);
    let sequences = around(coarse.sequence_ns, COARSE[1] as u64);
    let (error, time, p99_ms) = search(&ramps, [steps, sequences], FINE)?;
    println!("{time:?}, sum of squared logarithms {error:.3}");
    for ((point, _), ms) in ramps.iter().zip(p99_ms) {
        let (peak, published) = (point.peak, point.static_ms);
        println!("  peak {peak}: {ms:.0} ms, published {published:.0} ms");
    }
    Ok(())
}
