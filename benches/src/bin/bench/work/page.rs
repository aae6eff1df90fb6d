//! Allocating one page that was in use before, from the cache of handles and parked, and while the
//! engine's thread makes memory ahead for others.

use crate::bare::{Ordered, Plain, Range};
use crate::machine::{Machine, until, watch};
use crate::recorder;
use anyhow::{Context, Result, bail};
use cuda_vmm::{Engine, EngineOptions, PoolOptions, Stream, VirtualMemoryPool};
use cuda_vmm_benches::{Outcome, ParkedModels, Sides, time};
use std::thread;
use std::time::{Duration, Instant};

/// Allocates one page and frees it; the time of the allocation. Returns when the page is where it
/// goes.
fn one_page(
    machine: &Machine,
    pool: &VirtualMemoryPool,
    is_there: impl Fn(&cuda_vmm::EngineStats) -> bool,
) -> Result<Duration> {
    let (_, elapsed) = time(|| pool.allocate(0, machine.page_bytes))?;
    pool.deallocate(0, machine.page_bytes)?;
    machine.stream.synchronize()?;
    let is_there = |stats: &_| Ok(is_there(stats));
    until(pool.engine(), "the page to go back", is_there)?;
    Ok(elapsed)
}

/// A page whose handle is in the cache.
pub fn cached(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let (page_bytes, settings) = (machine.page_bytes, &machine.settings);
    let mut range = Range::reserve(&machine.device, page_bytes)?;
    range.create(page_bytes)?;
    let pool = machine.pool(EngineOptions::new().cache_bytes_max(64 << 20), page_bytes)?;
    let mut sides = Sides::new();
    sides.add("ours, handle in the cache", || {
        one_page(machine, &pool, |stats| {
            stats.parts.cached_bytes >= page_bytes
        })
    });
    sides.add("bare map and set access", || {
        let ((), elapsed) = time(|| range.map_last())?;
        range.unmap_last()?;
        Ok(elapsed)
    });
    outcome.measure(sides, settings, settings.rounds * 5)?;
    // In turns of their own, so that neither of the two above comes after one of these.
    let mut sides = Sides::new();
    sides.add("cuMemAlloc", || {
        Ok(time(|| Plain::new(&machine.device, page_bytes))?.1)
    });
    sides.add("cuMemAllocAsync, warm", || {
        // The driver's own pool keeps what was freed until something is synchronised.
        drop(Ordered::new(&machine.stream, page_bytes)?);
        Ok(time(|| Ordered::new(&machine.stream, page_bytes))?.1)
    });
    outcome.measure(sides, settings, settings.rounds * 5)?;
    // A page that is mapped goes back by itself, one that is not would be unmapped in vain.
    range.map_last()
}

/// Pages that are parked in each round.
const PAGES: usize = 64;

/// A page that is parked.
pub fn parked(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let parked = ParkedModels::new(&machine.device, &machine.stream, 1, PAGES)?;
    let mut sides = Sides::new();
    // One page takes hardly longer than reading the clock, so a sample is the mean of all.
    sides.add("ours, mean of 64 pages", || {
        parked.park(0)?;
        Ok(time(|| parked.take_back(0))?.1 / PAGES as u32)
    });
    sides.add("cuMemAllocAsync, warm, mean of 64 pages", || {
        let mut memory = Vec::with_capacity(PAGES);
        let mut take = || {
            let started = Instant::now();
            for _ in 0..PAGES {
                memory.push(Ordered::new(&machine.stream, machine.page_bytes)?);
            }
            let elapsed = started.elapsed();
            memory.clear();
            anyhow::Ok(elapsed / PAGES as u32)
        };
        // The driver's own pool keeps what was freed until something is synchronised.
        take()?;
        take()
    });
    // A round takes less than a millisecond.
    outcome.measure(sides, &machine.settings, machine.settings.rounds * 25)?;
    let stream = Stream::new(&machine.recorded)?;
    let recorded = ParkedModels::new(&machine.recorded, &stream, 1, PAGES)?;
    recorded.park(0)?;
    let (taken, calls) = recorder::record(|| recorded.take_back(0));
    outcome.count("driver calls", calls.len() as f64);
    taken
}

/// A model's pages, if the device has memory for that. Taking them back takes some hundred
/// microseconds, beside which it is little that threads do not begin at the very same moment.
const MODEL_PAGES: usize = 4096;

/// Threads that take back parked pages, each those of a model of its own, against one thread.
pub fn models(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let cores = thread::available_parallelism()?.get();
    let count = if cores < 8 { 2 } else { 8 };
    let unit_bytes = count * machine.page_bytes;
    let pages = machine.fitting(MODEL_PAGES * unit_bytes, 0.8, unit_bytes)? / unit_bytes;
    let models = &ParkedModels::new(&machine.device, &machine.stream, count, pages)?;
    let mut sides = Sides::new();
    for (name, threads) in [
        ("one thread, all pages of a model", 1),
        ("two threads, all pages of two models", 2),
        ("eight threads, all pages of eight models", 8),
    ] {
        // Fewer cores have nothing to show, which the note tells.
        if threads <= count.min(cores) {
            let taken = (threads * pages) as f64;
            sides.add_rate(name, taken, move || models.take(threads));
        }
        outcome.note(name, format!("{cores} cores, {pages} pages a model"));
    }
    outcome.measure(sides, &machine.settings, machine.settings.rounds * 5)
}

/// What is made ahead for the other range, in pages.
const PAGES_AHEAD: usize = 64;

/// A range that keeps its engine's thread at work, and where its live bytes end.
struct Other(VirtualMemoryPool, usize);

impl Other {
    fn new(machine: &Machine, engine: &Engine, capacity_bytes: usize) -> Result<Self> {
        let options = PoolOptions::new().ahead_bytes_max(PAGES_AHEAD * machine.page_bytes);
        let pool = machine.range(engine, capacity_bytes, options)?;
        pool.allocate(0, machine.page_bytes)?;
        Ok(Self(pool, machine.page_bytes))
    }

    /// Takes what was made ahead, so that the thread makes more, and returns when it is at it.
    fn keep_busy(mut self, machine: &Machine, engine: &Engine) -> Result<Self> {
        let ahead_bytes = PAGES_AHEAD * machine.page_bytes;
        // The thread may be done before it is seen at work.
        for _ in 0..100 {
            let capacity_bytes = self.0.capacity_bytes();
            if self.1 + 2 * ahead_bytes > capacity_bytes {
                self.0.close()?;
                self = Self::new(machine, engine, capacity_bytes)?;
            }
            watch(engine, "memory to be made ahead", |stats| {
                stats.parts.filling_bytes == 0 && stats.parts.ahead_bytes > 0
            })?;
            self.0.allocate(self.1, ahead_bytes)?;
            self.1 += ahead_bytes;
            watch(engine, "the thread to begin", |stats| {
                let there = stats.parts.ahead_bytes + stats.parts.slack_bytes;
                stats.parts.filling_bytes > 0 || there >= ahead_bytes
            })?;
            if engine.stats().parts.filling_bytes > 0 {
                return Ok(self);
            }
        }
        bail!("the thread was never seen at work")
    }
}

/// Against the same with an idle worker.
pub fn foreground(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let page_bytes = machine.page_bytes;
    // A chunk a page, so that the thread calls the driver as often as it can.
    let options = EngineOptions::new().chunk_bytes_max(0);
    let engine = Engine::new(&machine.device, options)?;
    let pool = machine.range(&engine, page_bytes, PoolOptions::new())?;
    let idle = machine.pool(EngineOptions::new(), page_bytes)?;
    let other_bytes = machine.fitting(16 << 30, 0.25, PAGES_AHEAD * page_bytes)?;
    let mut other = Some(Other::new(machine, &engine, other_bytes)?);
    let is_gone =
        |stats: &cuda_vmm::EngineStats| stats.parts.retiring_bytes + stats.parts.parked_bytes == 0;
    let mut sides = Sides::new();
    sides.add("ours, worker idle", || one_page(machine, &idle, is_gone));
    sides.add("ours, worker prefetches", || {
        let idle = other.take().context("the thread failed before")?;
        other = Some(idle.keep_busy(machine, &engine)?);
        one_page(machine, &pool, is_gone)
    });
    outcome.measure(sides, &machine.settings, machine.settings.rounds * 5)
}
