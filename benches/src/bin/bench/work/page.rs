//! Allocating one page that was in use before, from the cache of handles and parked, and while the engine's thread
//! makes memory ahead for others.

use crate::bare::{Ordered, Plain, Range};
use crate::machine::{Machine, until, watch};
use crate::recorder;
use anyhow::{Context, Result, bail};
use cuda_vmm::{Engine, EngineOptions, PoolOptions, Stream, VirtualMemoryPool};
use cuda_vmm_benches::{Outcome, ParkedModels, Sides, time};
use std::thread;
use std::time::{Duration, Instant};

/// Allocates one page and frees it; the time of the allocation. Returns when the page is where it goes.
fn one_page(
    machine: &Machine,
    pool: &VirtualMemoryPool,
    is_there: impl Fn(&cuda_vmm::EngineStats) -> bool,
) -> Result<Duration> {
    let (_, elapsed) = time(|| pool.allocate(0, machine.page_bytes))?;
    pool.deallocate(0, machine.page_bytes)?;
    machine.stream.synchronize()?;
    until(pool.engine(), "the page to go back", |stats| {
        Ok(is_there(stats))
    })?;
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
        one_page(machine, &pool, |stats| stats.cached_bytes >= page_bytes)
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

/// A model's pages, if the device has memory for that. Taking them back takes some hundred microseconds, beside which
/// it is little that threads do not begin at the very same moment.
const MODEL_PAGES: usize = 4096;

/// Threads that take back parked pages, each those of a model of its own, against one thread.
pub fn models(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    const EIGHT: &str = "eight threads, all pages of eight models";
    const TWO: &str = "two threads, all pages of two models";
    let cores = thread::available_parallelism()?.get();
    let count = if cores < 8 { 2 } else { 8 };
    let unit_bytes = count * machine.page_bytes;
    let pages = machine.fitting(MODEL_PAGES * unit_bytes, 0.8, unit_bytes)? / unit_bytes;
    let models = &ParkedModels::new(&machine.device, &machine.stream, count, pages)?;
    let mut sides = Sides::new();
    let all = [
        ("one thread, all pages of a model", 1),
        (TWO, 2),
        (EIGHT, 8),
    ];
    // On one core more threads gain nothing.
    for (name, threads) in all
        .into_iter()
        .filter(|(_, threads)| *threads <= count.min(cores))
    {
        let pages = (threads * pages) as f64;
        sides.add_rate(name, pages, move || models.take(threads));
    }
    outcome.note(TWO, format!("{cores} cores, {pages} pages a model"));
    let needed = if count < 8 {
        "eight cores are needed: "
    } else {
        ""
    };
    outcome.note(
        EIGHT,
        format!("{needed}{cores} cores, {pages} pages a model"),
    );
    outcome.measure(sides, &machine.settings, machine.settings.rounds * 5)
}

/// What is made ahead for the other range, in pages.
const PAGES_AHEAD: usize = 64;

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
    /// Begins anew, for the first time or because the range was at its end.
    fn begin(&mut self) -> Result<()> {
        let page_bytes = self.machine.page_bytes;
        let options = PoolOptions::new().ahead_bytes_max(PAGES_AHEAD * page_bytes);
        self.pool.take().map(VirtualMemoryPool::close).transpose()?;
        let pool = self
            .machine
            .range(self.engine, self.capacity_bytes, options)?;
        pool.allocate(0, page_bytes)?;
        self.end = page_bytes;
        self.pool = Some(pool);
        Ok(())
    }

    /// Takes what was made ahead, so that the thread makes more, and returns when it is at it.
    fn keep_busy(&mut self) -> Result<()> {
        let ahead_bytes = PAGES_AHEAD * self.machine.page_bytes;
        // The thread may be done before it is seen at work.
        for _ in 0..100 {
            if self.end + 2 * ahead_bytes > self.capacity_bytes {
                self.begin()?;
            }
            watch(self.engine, "memory to be made ahead", |stats| {
                stats.filling_bytes == 0 && stats.ahead_bytes > 0
            })?;
            let pool = self.pool.as_ref().context("no range")?;
            pool.allocate(self.end, ahead_bytes)?;
            self.end += ahead_bytes;
            watch(self.engine, "the thread to begin", |stats| {
                let there = stats.ahead_bytes + stats.slack_bytes;
                stats.filling_bytes > 0 || there >= ahead_bytes
            })?;
            if self.engine.stats().filling_bytes > 0 {
                return Ok(());
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
    let mut other = Other {
        machine,
        engine: &engine,
        capacity_bytes: machine.fitting(16 << 30, 0.25, PAGES_AHEAD * page_bytes)?,
        pool: None,
        end: 0,
    };
    other.begin()?;
    let is_gone = |stats: &cuda_vmm::EngineStats| stats.retiring_bytes + stats.parked_bytes == 0;
    let mut sides = Sides::new();
    sides.add("ours, worker idle", || one_page(machine, &idle, is_gone));
    sides.add("ours, worker prefetches", || {
        other.keep_busy()?;
        one_page(machine, &pool, is_gone)
    });
    outcome.measure(sides, &machine.settings, machine.settings.rounds * 5)
}
