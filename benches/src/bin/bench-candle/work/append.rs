//! Tokens appended one by one, and all of them looked at.

use super::{Outcome, Work};
use crate::demand::{Demand, Reach};
use crate::layers::{Layers, tokens};
use crate::machine::Machine;
use crate::sides::Sides;
use anyhow::Result;
use std::time::{Duration, Instant};

const SHORT: Demand = Demand::time(
    "append and view, 32 layers, 4,096 tokens, a layer's step: KvCache, preallocated",
    "µs",
    Reach::AtMostTimes(1.0),
);
const LONG: Demand = Demand::time(
    "append and view, 32 layers, 16,384 tokens, a layer's step: KvCache, preallocated",
    "µs",
    Reach::AtMostTimes(1.0),
);

/// Against Candle's preallocated cache.
pub const WORK: Work = Work {
    name: "append and view",
    demands: &[SHORT, LONG],
    measure,
};

/// The demand, our side, and the peer's, for each length.
const ROWS: [(Demand, &str, &str); 2] = [
    (SHORT, "ours, shorter", "KvCache, shorter"),
    (LONG, "ours, longer", "KvCache, longer"),
];

fn measure(machine: &Machine) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    for ((demand, ours, peer), count) in ROWS.iter().zip(machine.sizes.decoded) {
        let stretch = machine.sizes.stretch;
        let token = tokens(machine, 1)?;
        let pool = machine.pool()?;
        let mut elastic = Layers::elastic(machine, &pool, count);
        let mut preallocated = Layers::preallocated(machine, count);
        let mut sides = Sides::new();
        sides.add(ours, || timed(machine, || elastic.append(&token)));
        sides.add(peer, || timed(machine, || preallocated.append(&token)));
        // All tokens are appended; the first stretch warms up.
        let rounds = count / stretch - 1;
        let measured = sides.measure(&machine.settings.whole(), rounds)?;
        outcome.measured.extend(measured);
        let tail = |side| anyhow::Ok(outcome.measured.samples(side)?.quantile_ns(990) / 1e3);
        let note = format!(
            "{count} tokens; the mean of {stretch} steps is a sample; p99 {:.2} µs and {:.2} µs",
            tail(ours)?,
            tail(peer)?
        );
        let (ours, peer) = (
            outcome.measured.median_us(ours)?,
            outcome.measured.median_us(peer)?,
        );
        outcome.add_noted(demand, ours, Some(peer), note);
    }
    Ok(outcome)
}

/// The time of one layer's step, of a stretch of steps that are waited for at its end.
fn timed(machine: &Machine, mut step: impl FnMut() -> Result<()>) -> Result<Duration> {
    machine.synchronize()?;
    let started = Instant::now();
    for _ in 0..machine.sizes.stretch {
        step()?;
    }
    machine.synchronize()?;
    Ok(started.elapsed() / (machine.sizes.stretch * machine.sizes.layers) as u32)
}
