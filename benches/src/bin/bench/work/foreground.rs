//! An allocation that someone waits for, while the engine's thread makes memory ahead for others.

use super::{Outcome, Work};
use crate::demand::{Demand, Reach};
use crate::machine::{self, Machine, time, until, watch};
use crate::sides::Sides;
use anyhow::{Context, Result, bail};
use cuda_vmm::{Engine, PoolOptions, VirtualMemoryPool};
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

/// One page from the driver, which goes back to it.
fn one_page(machine: &Machine, pool: &VirtualMemoryPool) -> Result<Duration> {
    let page_bytes = machine.page_bytes;
    let (_, elapsed) = time(|| pool.allocate(0, page_bytes))?;
    pool.deallocate(0, page_bytes)?;
    machine.stream.synchronize()?;
    until(pool.engine(), "the page to go back", |stats| {
        Ok(stats.parts.retiring_bytes + stats.parts.parked_bytes == 0)
    })?;
    Ok(elapsed)
}

/// A range that keeps its engine's thread at work.
struct Other<'a> {
    machine: &'a Machine,
    engine: &'a Engine,
    capacity_bytes: usize,
    pool: Option<VirtualMemoryPool>,
    /// Where its live bytes end.
    end: usize,
}

impl Other<'_> {
    fn ahead_bytes(&self) -> usize {
        PAGES_AHEAD * self.machine.page_bytes
    }

    /// Begins anew, for the first time or because the range was at its end.
    fn begin(&mut self) -> Result<()> {
        let page_bytes = self.machine.page_bytes;
        let options = PoolOptions::new().ahead_bytes_max(self.ahead_bytes());
        self.pool.take().map(VirtualMemoryPool::close).transpose()?;
        let pool =
            VirtualMemoryPool::with_options(self.engine, self.capacity_bytes, page_bytes, options)?;
        pool.use_stream(&self.machine.stream)?;
        pool.allocate(0, page_bytes)?;
        self.end = page_bytes;
        self.pool = Some(pool);
        Ok(())
    }

    /// Takes what was made ahead, so that the thread makes more, and returns when it is at it.
    fn keep_busy(&mut self) -> Result<()> {
        let ahead_bytes = self.ahead_bytes();
        // The thread may be done before it is seen at work.
        for _ in 0..100 {
            if self.end + 2 * ahead_bytes > self.capacity_bytes {
                self.begin()?;
            }
            watch(self.engine, "memory to be made ahead", |stats| {
                stats.parts.filling_bytes == 0 && stats.parts.ahead_bytes > 0
            })?;
            let pool = self.pool.as_ref().context("no range")?;
            pool.allocate(self.end, ahead_bytes)?;
            self.end += ahead_bytes;
            watch(self.engine, "the thread to begin", |stats| {
                let there = stats.parts.ahead_bytes + stats.parts.slack_bytes;
                stats.parts.filling_bytes > 0 || there >= ahead_bytes
            })?;
            if self.engine.stats().parts.filling_bytes > 0 {
                return Ok(());
            }
        }
        bail!("the thread was never seen at work")
    }
}

fn measure(machine: &Machine) -> Result<Outcome> {
    let page_bytes = machine.page_bytes;
    // A chunk a page, so that the thread calls the driver as often as it can.
    let options = machine::options().chunk_bytes_max(0);
    let engine = Engine::new(&machine.device, options)?;
    let pool = VirtualMemoryPool::on_engine(&engine, page_bytes, page_bytes)?;
    pool.use_stream(&machine.stream)?;
    let idle = machine.pool(machine::options(), page_bytes)?;
    let mut other = Other {
        machine,
        engine: &engine,
        capacity_bytes: machine.fitting(16 << 30, 0.25, PAGES_AHEAD * page_bytes)?,
        pool: None,
        end: 0,
    };
    other.begin()?;
    let mut sides = Sides::new();
    sides.add("ours, worker idle", || one_page(machine, &idle));
    sides.add("ours, worker prefetches", || {
        other.keep_busy()?;
        one_page(machine, &pool)
    });
    let mut outcome = Outcome::new(sides.measure(&machine.settings, machine.settings.rounds * 5)?);
    let tail_us = |side| anyhow::Ok(outcome.measured.samples(side)?.quantile_ns(990) / 1e3);
    let ours = tail_us("ours, worker prefetches")?;
    let peer = tail_us("ours, worker idle")?;
    outcome.add(&BESIDE, ours, Some(peer));
    Ok(outcome)
}
