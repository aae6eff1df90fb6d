//! Allocating one page: from the cache of handles, parked, and while the worker prefetches.

use crate::bare::Range;
use crate::machine::{Machine, range};
use anyhow::{Result, bail};
use cuda_vmm::{Engine, EngineOptions, EngineStats, PoolOptions, VirtualMemoryPool};
use cuda_vmm_benches::{Outcome, ParkedModels, Sides, noted_calls, step_until, time, watch};
use std::thread;
use std::time::Duration;

/// The time of allocating one page, which is freed. Returns when the page is where it goes.
fn one_page(
    machine: &Machine,
    pool: &VirtualMemoryPool,
    is_there: impl Fn(&EngineStats) -> bool,
) -> Result<Duration> {
    let (_, elapsed) = time(|| pool.allocate(0, machine.page_bytes))?;
    pool.deallocate(0, machine.page_bytes)?;
    machine.stream.synchronize()?;
    let is_there = |stats: &_| Ok(is_there(stats));
    step_until(pool.engine(), "the page to go back", is_there)?;
    Ok(elapsed)
}

pub fn cached(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let (page_bytes, settings) = (machine.page_bytes, &machine.settings);
    let mut range = Range::reserve(&machine.device, page_bytes)?;
    let chunk = range.create(page_bytes)?;
    let pool = machine.pool(EngineOptions::new().cache_bytes_max(64 << 20), page_bytes)?;
    let mut sides = Sides::default();
    let is_cached = |stats: &EngineStats| stats.parts.cached_bytes >= page_bytes;
    let ours = || one_page(machine, &pool, is_cached);
    sides.add("ours, handle in the cache", ours);
    sides.add("bare map and set access", || {
        let ((), elapsed) = time(|| range.map(chunk))?;
        range.unmap(chunk)?;
        Ok(elapsed)
    });
    outcome.measure(sides, settings, settings.rounds * 5)?;
    // A page that is mapped goes back by itself, one that is not would be unmapped in vain.
    range.map(chunk)
}

const PAGES: usize = 64;

pub fn parked(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let parked = ParkedModels::new(&machine.stream, 1, PAGES)?;
    let mut sides = Sides::default();
    // One page takes hardly longer than reading the clock, so a sample is the mean of all.
    sides.add("ours, mean of 64 pages", || {
        parked.park(0)?;
        Ok(time(|| parked.take_back(0))?.1 / PAGES as u32)
    });
    // A round takes less than a millisecond.
    outcome.measure(sides, &machine.settings, machine.settings.rounds * 25)?;
    let noted = ParkedModels::new(&machine.noted, 1, PAGES)?;
    noted.park(0)?;
    let (taken, calls) = noted_calls(|| noted.take_back(0));
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
    let models = &ParkedModels::new(&machine.stream, count, pages)?;
    let mut sides = Sides::default();
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

/// What is made ahead for another range, in pages.
const PAGES_AHEAD: usize = 64;

/// Against the same with an idle worker.
pub fn foreground(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let (page_bytes, stream) = (machine.page_bytes, &machine.stream);
    let ahead_bytes = machine.fitting(PAGES_AHEAD * page_bytes, 0.25, page_bytes)?;
    // A chunk a page, so that the thread calls the driver as often as it can.
    let options = EngineOptions::new().chunk_bytes_max(0);
    let engine = Engine::new(&machine.device, options)?;
    let pool = range(&engine, page_bytes, PoolOptions::new(), stream)?;
    let idle = machine.pool(EngineOptions::new(), page_bytes)?;
    let is_gone = |stats: &EngineStats| stats.parts.retiring_bytes + stats.parts.parked_bytes == 0;
    let mut sides = Sides::default();
    sides.add("ours, worker idle", || one_page(machine, &idle, is_gone));
    sides.add("ours, worker prefetches", || {
        // The thread may be done before it is seen at work.
        for _ in 0..100 {
            let options = PoolOptions::new().ahead_bytes_max(ahead_bytes);
            let other = range(&engine, 2 * ahead_bytes, options, stream)?;
            other.allocate(0, page_bytes)?;
            watch(&engine, "the thread to begin", |stats| {
                let there = stats.parts.ahead_bytes + stats.parts.slack_bytes;
                stats.parts.filling_bytes > 0 || there >= ahead_bytes
            })?;
            let is_at_work = engine.stats().parts.filling_bytes > 0;
            let elapsed = one_page(machine, &pool, is_gone)?;
            other.close()?;
            if is_at_work {
                return Ok(elapsed);
            }
        }
        bail!("the thread was never seen at work")
    });
    outcome.measure(sides, &machine.settings, machine.settings.rounds * 5)
}
