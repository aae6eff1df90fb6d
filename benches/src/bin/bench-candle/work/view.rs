//! A view of a tensor that grows: making it, and dropping it.

use super::{Outcome, Work};
use crate::demand::{Demand, Reach};
use crate::layers::{DTYPE, HEAD_DIM, KV_HEADS};
use crate::machine::Machine;
use crate::sides::Sides;
use anyhow::Result;
use std::hint::black_box;
use std::time::Instant;

const VIEW: Demand = Demand::time("make and drop a view", "µs", Reach::AtMost(2.0));

/// On its own.
pub const WORK: Work = Work {
    name: "make and drop a view",
    demands: &[VIEW],
    measure,
};

/// One view takes hardly longer than reading the clock, so a sample is the mean of all.
const VIEWS: usize = 64;
const OURS: &str = "ours, mean of 64 views";

fn measure(machine: &Machine) -> Result<Outcome> {
    let pool = machine.pool()?;
    let mut tensor = pool.tensor((KV_HEADS, HEAD_DIM), DTYPE)?;
    tensor.grow(1000)?;
    machine.synchronize()?;
    let mut sides = Sides::new();
    sides.add(OURS, || {
        let started = Instant::now();
        for _ in 0..VIEWS {
            drop(black_box(tensor.view()?));
        }
        Ok(started.elapsed() / VIEWS as u32)
    });
    let measured = sides.measure(&machine.settings, machine.settings.rounds * 25)?;
    let mut outcome = Outcome::new(measured);
    let tail_us = outcome.measured.samples(OURS)?.quantile_ns(990) / 1e3;
    let ours = outcome.measured.median_us(OURS)?;
    outcome.add_noted(&VIEW, ours, None, format!("p99 {tail_us:.2} µs"));
    Ok(outcome)
}
