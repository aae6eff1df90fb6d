//! Finding the constants of the time model.
//!
//! One pair of constants for the whole published static curve: the one with the least sum, over the peaks, of the squared
//! logarithms of simulated to published p99 time to first token. First on a coarse grid, then on a fine one around the best.

use crate::arrivals::{PHASES, Phase, staggered_ramps};
use crate::outcome::{Outcome, Times};
use crate::pools::blocks_within;
use crate::pools::static_split::StaticSplit;
use crate::published::CURVES;
use crate::scheduler::{Limits, Order};
use crate::simulation;
use crate::time_model::TimeModel;
use crate::work::ramps::{MODELS, SIZES};
use crate::workload::Workload;
use anyhow::{Context, Result};
use std::ops::RangeInclusive;

/// A grid: both constants from, to, and by steps, in nanoseconds.
type Axis = (RangeInclusive<u64>, u64);

const COARSE: (Axis, Axis) = ((10_000_000..=40_000_000, 2_000_000), (0..=300_000, 20_000));
const FINE_STEPS: (u64, u64) = (250_000, 5_000);
/// Every so many phases is tried.
const PHASE_STEP: Phase = 2;

/// What a pair of constants comes to.
#[derive(Clone, Debug)]
struct Try {
    error: f64,
    time: TimeModel,
    p99_ms: Vec<f64>,
}

/// The static curve with these constants.
fn attempt(ramps: &[Vec<Workload>], time: TimeModel, limits: Limits) -> Result<Try> {
    let mut p99_ms = Vec::new();
    for variants in ramps {
        let outcomes = variants.iter().map(|workload| {
            let blocks = blocks_within(SIZES.static_tokens);
            let mut memory = StaticSplit::new(blocks, workload.models.len());
            simulation::run(workload, &mut memory, time, limits)
        });
        let outcomes: Vec<Outcome> = outcomes.collect::<Result<_>>()?;
        let times = outcomes.into_iter().map(|outcome| outcome.first_token);
        let times = times.reduce(Times::merged).context("no workload")?;
        p99_ms.push(times.percentile_ms(99));
    }
    let errors = CURVES.iter().zip(&p99_ms);
    let error = errors
        .map(|(point, ms)| (ms / point.static_ms).ln().powi(2))
        .sum();
    Ok(Try {
        error,
        time,
        p99_ms,
    })
}

/// The best pair of a grid.
fn search(ramps: &[Vec<Workload>], limits: Limits, (step, sequence): &(Axis, Axis)) -> Result<Try> {
    let mut best: Option<Try> = None;
    for step_ns in step.0.clone().step_by(step.1 as usize) {
        for sequence_ns in sequence.0.clone().step_by(sequence.1 as usize) {
            let time = TimeModel {
                step_ns,
                sequence_ns,
            };
            let one = attempt(ramps, time, limits)?;
            if best.as_ref().is_none_or(|best| one.error < best.error) {
                best = Some(one);
            }
        }
    }
    best.context("an empty grid")
}

/// Around a value, as far as the coarse grid's step.
fn around(value: u64, coarse_step: u64, step: u64) -> Axis {
    (
        value.saturating_sub(coarse_step)..=value + coarse_step,
        step,
    )
}

/// Fits, and prints what was found for each order of prompts.
///
/// # Errors
/// If a simulation fails.
pub fn run() -> Result<()> {
    let workload = |peak, phase| Workload {
        models: staggered_ramps(MODELS, peak, phase),
    };
    let variants = |peak| {
        (0..PHASES)
            .step_by(PHASE_STEP as usize)
            .map(move |phase| workload(peak, phase))
    };
    let ramps: Vec<Vec<_>> = CURVES
        .iter()
        .map(|point| variants(point.peak).collect())
        .collect();
    for order in [Order::Mixed, Order::PromptsFirst] {
        let limits = Limits {
            order,
            ..Limits::DEFAULT
        };
        let coarse = search(&ramps, limits, &COARSE)?;
        let fine = (
            around(coarse.time.step_ns, COARSE.0.1, FINE_STEPS.0),
            around(coarse.time.sequence_ns, COARSE.1.1, FINE_STEPS.1),
        );
        let best = search(&ramps, limits, &fine)?;
        println!(
            "{order:?}: {:?}, sum of squared logarithms {:.3}",
            best.time, best.error
        );
        for (point, ms) in CURVES.iter().zip(&best.p99_ms) {
            println!(
                "  peak {}: {ms:.0} ms, published {:.0} ms",
                point.peak, point.static_ms
            );
        }
    }
    Ok(())
}
