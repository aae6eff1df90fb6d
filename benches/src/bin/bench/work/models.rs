//! Threads that take back parked pages at the same time, each those of a model of its own.

use super::{Outcome, Work};
use crate::demand::{Demand, Reach};
use crate::machine::Machine;
use crate::sides::Sides;
use anyhow::Result;
use cuda_vmm_benches::ParkedModels;
use std::thread;

const TWO: Demand = Demand::time(
    "take back parked pages: two threads on two models, one thread on one",
    "pages/s",
    Reach::AtLeastTimes(1.7),
);
const EIGHT: Demand = Demand::time(
    "take back parked pages: eight threads on eight models, one thread on one",
    "pages/s",
    Reach::AtLeastTimes(6.0),
);

/// Against one thread.
pub const WORK: Work = Work {
    name: "parked pages of several models at a time",
    demands: &[TWO, EIGHT],
    measure,
};

/// A model's pages, if the device has memory for that. Taking them back takes some hundred microseconds, beside which it
/// is little that threads do not begin at the very same moment.
const PAGES: usize = 4096;

const ONE_SIDE: &str = "one thread, all pages of a model";
const TWO_SIDE: &str = "two threads, all pages of two models";
const EIGHT_SIDE: &str = "eight threads, all pages of eight models";

fn measure(machine: &Machine) -> Result<Outcome> {
    let cores = thread::available_parallelism()?.get();
    let count = if cores < 8 { 2 } else { 8 };
    let unit_bytes = count * machine.page_bytes;
    let pages = machine.fitting(PAGES * unit_bytes, 0.8, unit_bytes)? / unit_bytes;
    let models = ParkedModels::new(&machine.device, &machine.stream, count, pages)?;
    let mut sides = Sides::new();
    sides.add(ONE_SIDE, || models.take(1));
    sides.add(TWO_SIDE, || models.take(2));
    if cores >= 8 {
        sides.add(EIGHT_SIDE, || models.take(8));
    }
    let measured = sides.measure(&machine.settings, machine.settings.rounds * 5)?;
    let rate = |side: &str, threads: usize| {
        let seconds = measured.samples(side)?.median_ns() / 1e9;
        anyhow::Ok((threads * pages) as f64 / seconds)
    };
    let one = rate(ONE_SIDE, 1)?;
    let two = rate(TWO_SIDE, 2)?;
    let eight = (cores >= 8).then(|| rate(EIGHT_SIDE, 8)).transpose()?;
    let note = format!("{cores} cores, {pages} pages a model");
    let mut outcome = Outcome::new(measured);
    // On one core there is nothing to be had.
    match cores {
        1 => outcome.findings.push(TWO.unmeasured("one core")),
        _ => outcome.add_noted(&TWO, two, Some(one), note.clone()),
    }
    match eight {
        Some(eight) => outcome.add_noted(&EIGHT, eight, Some(one), note),
        None => {
            (outcome.findings).push(EIGHT.unmeasured(format!("eight cores are needed: {note}")))
        }
    }
    Ok(outcome)
}
