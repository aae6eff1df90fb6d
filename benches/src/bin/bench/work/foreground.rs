//! An allocation that someone waits for, while the engine's thread makes memory ahead for others.

use super::{Outcome, Work};
use crate::demand::{Demand, Reach};
use crate::features;
use crate::machine::{self, Machine, time, until};
use crate::sides::Sides;
use anyhow::Result;
use cuda_vmm::{Engine, VirtualMemoryPool};
use std::cell::Cell;
use std::time::Duration;

const BESIDE: Demand = Demand::time(
    "allocate one page while the worker prefetches, p99: the same, worker idle",
    "µs",
    Reach::AtMostTimes(2.0),
);

/// Against the same with an idle worker.
pub const WORK: Work = Work {
    name: "allocate one page while the worker prefetches",
    demands: &[BESIDE],
    measure,
};

/// What is made ahead for the other range, in pages.
const PAGES_AHEAD: usize = 64;
/// The other range's addresses, in pages: enough that it never comes to its end in a round.
const PAGES: usize = 1 << 16;

/// One page from the driver, which goes back to it.
fn one_page(machine: &Machine, pool: &VirtualMemoryPool) -> Result<Duration> {
    let page_bytes = machine.page_bytes;
    let (_, elapsed) = time(|| pool.allocate(0, page_bytes))?;
    pool.deallocate(0, page_bytes)?;
    Ok(elapsed)
}

/// The same, with the worker of the same engine at work for another range.
fn beside(
    machine: &Machine,
    pool: &VirtualMemoryPool,
    other: &VirtualMemoryPool,
    end: &Cell<usize>,
) -> Result<Duration> {
    let ahead_bytes = PAGES_AHEAD * machine.page_bytes;
    until(pool.engine(), "memory to be made ahead", |stats| {
        Ok(features::ahead_bytes(stats) >= ahead_bytes)
    })?;
    if end.get() + 2 * ahead_bytes > other.capacity_bytes() {
        other.deallocate(0, end.get())?;
        machine.give_back(other.engine())?;
        end.set(0);
    }
    // All that was made ahead is taken, so that the worker begins anew.
    other.allocate(end.get(), ahead_bytes)?;
    end.set(end.get() + ahead_bytes);
    until(pool.engine(), "the worker to begin", |stats| {
        Ok(features::ahead_bytes(stats) > 0)
    })?;
    one_page(machine, pool)
}

fn measure(machine: &Machine) -> Result<Outcome> {
    let page_bytes = machine.page_bytes;
    let engine = Engine::new(&machine.device, machine::options())?;
    // What is live at a time must fit the device.
    let pages = machine.fitting(PAGES * page_bytes, 0.25, PAGES_AHEAD * page_bytes)?;
    let ahead_bytes = PAGES_AHEAD * page_bytes;
    let other = features::prefetched(&engine, pages, page_bytes, ahead_bytes).transpose()?;
    let pool = VirtualMemoryPool::on_engine(&engine, page_bytes, page_bytes)?;
    pool.use_stream(&machine.stream)?;
    let idle = machine.pool(machine::options(), page_bytes)?;
    let mut sides = Sides::new();
    sides.add("ours, worker idle", || {
        let elapsed = one_page(machine, &idle)?;
        machine.give_back(idle.engine())?;
        Ok(elapsed)
    });
    let end = Cell::new(0);
    if let Some(other) = &other {
        other.use_stream(&machine.stream)?;
        other.allocate(0, page_bytes)?;
        end.set(page_bytes);
        sides.add("ours, worker prefetches", || {
            let elapsed = beside(machine, &pool, other, &end)?;
            machine.stream.synchronize()?;
            until(&engine, "the page to go back", |stats| {
                Ok(stats.retiring_bytes + stats.parked_bytes == 0)
            })?;
            Ok(elapsed)
        });
    }
    let mut outcome = Outcome::new(sides.measure(&machine.settings, machine.settings.rounds * 5)?);
    if other.is_some() {
        let tail_us = |side| anyhow::Ok(outcome.measured.samples(side)?.quantile_ns(990) / 1e3);
        let (ours, peer) = (
            tail_us("ours, worker prefetches")?,
            tail_us("ours, worker idle")?,
        );
        outcome.add(&BESIDE, ours, Some(peer));
    } else {
        outcome.add_unmeasured(&BESIDE, features::NO_PREFETCH);
    }
    Ok(outcome)
}
