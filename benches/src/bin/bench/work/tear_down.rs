//! The end of a pool that holds much.

use super::one_shot::chunks_of;
use super::{Outcome, Work};
use crate::bare::Range;
use crate::demand::{Demand, Reach};
use crate::machine::{self, Machine, time};
use crate::sides::Sides;
use anyhow::Result;

const WHOLE: Demand = Demand::time(
    "tear down 64 GiB: bare unmap and release of the same chunks",
    "µs",
    Reach::AtMostTimes(1.05),
);

/// Against bare calls for the same chunks.
pub const WORK: Work = Work {
    name: "tear down 64 GiB",
    demands: &[WHOLE],
    measure,
};

fn measure(machine: &Machine) -> Result<Outcome> {
    let bytes = machine.fitting(64 << 30, 0.95, 1 << 30)?;
    let chunks = chunks_of(machine, bytes)?;
    let mut range = Range::reserve(&machine.device, bytes)?;
    let mut sides = Sides::new();
    sides.add("ours", || {
        let pool = machine.pool(machine::options(), bytes)?;
        pool.allocate(0, bytes)?;
        Ok(time(|| pool.close())?.1)
    });
    sides.add("bare unmap and release", || {
        range.back(&chunks)?;
        Ok(time(|| range.give_back())?.1)
    });
    // The bare calls alone spread by a sixth, so the medians of some thirty rounds would differ by more than what is
    // demanded of their ratio. A round takes about a third of a second, most of it to fill the range again.
    let rounds = machine.settings.rounds.div_ceil(2);
    let settings = machine.settings.patient(4);
    let mut outcome = Outcome::new(sides.measure(&settings, rounds)?);
    let ours = outcome.measured.median_us("ours")?;
    let peer = outcome.measured.median_us("bare unmap and release")?;
    let note = format!("{} GiB in {} chunks", bytes >> 30, chunks.len());
    outcome.add_noted(&WHOLE, ours, Some(peer), note);
    Ok(outcome)
}
