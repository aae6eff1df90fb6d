//! The worst step of a long decode.

use super::{Outcome, Work};
use crate::demand::{Demand, Reach};
use crate::layers::{DTYPE, Layers, tokens};
use crate::machine::Machine;
use crate::sides::Sides;
use anyhow::Result;
use candle_core::Tensor;
use std::hint::black_box;
use std::time::{Duration, Instant};

const WORST: Demand = Demand::time(
    "worst decode step of 16,384, 32 layers and a matrix: worst with memory preallocated",
    "µs",
    Reach::AtMostTimes(1.2),
);
const TAIL: Demand = Demand::time(
    "p99.9 of 16,384 decode steps, 32 layers and a matrix: p99.9 with memory preallocated",
    "µs",
    Reach::Open,
);

/// Against memory that was there before.
pub const WORK: Work = Work {
    name: "worst decode step",
    demands: &[WORST, TAIL],
    measure,
};

/// Steps before the first that counts, besides the round that warms up.
const WARM: usize = 16;

const OURS: &str = "ours";
const PEER: &str = "KvCache, preallocated";

fn measure(machine: &Machine) -> Result<Outcome> {
    let (steps, size) = (machine.sizes.steps, machine.sizes.matrix);
    let most = steps + WARM + 1;
    let token = tokens(machine, 1)?;
    let matrix = Tensor::ones((size, size), DTYPE, &machine.candle)?;
    let pool = machine.pool()?;
    let mut elastic = Layers::elastic(machine, &pool, most);
    let mut preallocated = Layers::preallocated(machine, most);
    for _ in 0..WARM {
        elastic.append(&token)?;
        preallocated.append(&token)?;
        black_box(matrix.matmul(&matrix)?);
    }
    machine.synchronize()?;
    let mut sides = Sides::new();
    sides.add(OURS, || timed(machine, &matrix, || elastic.append(&token)));
    sides.add(PEER, || {
        timed(machine, &matrix, || preallocated.append(&token))
    });
    let mut outcome = Outcome::new(sides.measure(&machine.settings.whole(), steps)?);
    let (ours, peer) = (
        outcome.measured.samples(OURS)?.clone(),
        outcome.measured.samples(PEER)?.clone(),
    );
    let note = format!(
        "{steps} steps; medians {:.1} µs and {:.1} µs",
        ours.median_ns() / 1e3,
        peer.median_ns() / 1e3
    );
    outcome.add_noted(&WORST, ours.max_ns() / 1e3, Some(peer.max_ns() / 1e3), note);
    let tail = |samples: &crate::samples::Samples| samples.quantile_ns(999) / 1e3;
    outcome.add(&TAIL, tail(&ours), Some(tail(&peer)));
    Ok(outcome)
}

/// The time of a step, until the device has done it.
fn timed(
    machine: &Machine,
    matrix: &Tensor,
    append: impl FnOnce() -> Result<()>,
) -> Result<Duration> {
    let started = Instant::now();
    append()?;
    let product = matrix.matmul(matrix)?;
    machine.synchronize()?;
    let elapsed = started.elapsed();
    black_box(product);
    Ok(elapsed)
}
