//! Allocating one page that was in use before: from the cache of handles, and parked.

use super::{Outcome, Work};
use crate::bare::{Ordered, Plain, Range};
use crate::demand::{Demand, Reach};
use crate::machine::{self, Machine, time, until};
use crate::recorder;
use crate::sides::Sides;
use anyhow::Result;
use cuda_vmm::{Engine, Stream, VirtualMemoryPool};
use std::time::Instant;

const FROM_CACHE: Demand = Demand::time(
    "allocate one page, handle in the cache: bare map and set access",
    "µs",
    Reach::AtMostTimes(1.1),
);

/// A page whose handle is in the cache.
pub const CACHED: Work = Work {
    name: "allocate one page from the cache",
    demands: &[FROM_CACHE],
    measure: measure_cached,
};

const FROM_PARKED: Demand = Demand::time(
    "allocate one parked page, fence seen complete",
    "ns",
    Reach::AtMost(150.0),
);
const CALLS: Demand = Demand::count(
    "allocate one parked page, fence seen complete: driver calls",
    "calls",
    Reach::AtMost(0.0),
);

/// A page that is parked.
pub const PARKED: Work = Work {
    name: "allocate one parked page",
    demands: &[FROM_PARKED, CALLS],
    measure: measure_parked,
};

fn measure_cached(machine: &Machine) -> Result<Outcome> {
    let page_bytes = machine.page_bytes;
    let mut range = Range::reserve(&machine.device, page_bytes)?;
    range.create(page_bytes)?;
    let pool = machine.pool(machine::options().cache_bytes_max(64 << 20), page_bytes)?;
    let mut sides = Sides::new();
    sides.add("ours, handle in the cache", || {
        let (_, elapsed) = time(|| pool.allocate(0, page_bytes))?;
        pool.deallocate(0, page_bytes)?;
        machine.stream.synchronize()?;
        until(pool.engine(), "the handle to reach the cache", |stats| {
            Ok(stats.parts.cached_bytes >= page_bytes)
        })?;
        Ok(elapsed)
    });
    sides.add("bare map and set access", || {
        let ((), elapsed) = time(|| range.map_last())?;
        range.unmap_last()?;
        Ok(elapsed)
    });
    let rounds = machine.settings.rounds * 5;
    let mut measured = sides.measure(&machine.settings, rounds)?;
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
    measured.extend(sides.measure(&machine.settings, rounds)?);
    // A page that is mapped goes back by itself, one that is not would be unmapped in vain.
    range.map_last()?;
    let mut outcome = Outcome::new(measured);
    outcome.add_medians(
        &FROM_CACHE,
        "ours, handle in the cache",
        "bare map and set access",
    )?;
    Ok(outcome)
}

/// Pages that are parked in each round.
const PAGES: usize = 64;

/// A pool with pages that are parked and taken back. Each lies apart from the others, so that each is one chunk.
struct Parked {
    pool: VirtualMemoryPool,
    stream: Stream,
}

impl Parked {
    fn new(machine: &Machine, stream: &Stream) -> Result<Self> {
        let engine = Engine::new(stream.device(), machine::options().park_bytes_max(1 << 30))?;
        let page_bytes = machine.page_bytes;
        let pool = VirtualMemoryPool::on_engine(&engine, 2 * PAGES * page_bytes, page_bytes)?;
        pool.use_stream(stream)?;
        let parked = Self {
            pool,
            stream: stream.clone(),
        };
        parked.take()?;
        parked.park()?;
        Ok(parked)
    }

    fn offsets(&self) -> impl Iterator<Item = usize> {
        let page_bytes = self.pool.page_bytes();
        (0..PAGES).map(move |page| 2 * page * page_bytes)
    }

    fn take(&self) -> Result<()> {
        let page_bytes = self.pool.page_bytes();
        for offset in self.offsets() {
            self.pool.allocate(offset, page_bytes)?;
        }
        Ok(())
    }

    fn park(&self) -> Result<()> {
        let page_bytes = self.pool.page_bytes();
        for offset in self.offsets() {
            self.pool.deallocate(offset, page_bytes)?;
        }
        self.stream.synchronize()?;
        until(self.pool.engine(), "pages to be parked", |stats| {
            Ok(stats.parts.parked_bytes == PAGES * page_bytes)
        })
    }
}

fn measure_parked(machine: &Machine) -> Result<Outcome> {
    let parked = Parked::new(machine, &machine.stream)?;
    let mut sides = Sides::new();
    // One page takes hardly longer than reading the clock, so a sample is the mean of all.
    sides.add("ours, mean of 64 pages", || {
        let started = Instant::now();
        parked.take()?;
        let elapsed = started.elapsed();
        parked.park()?;
        Ok(elapsed / PAGES as u32)
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
    let measured = sides.measure(&machine.settings, machine.settings.rounds * 25)?;
    let mut outcome = Outcome::new(measured);
    let ours_ns = outcome
        .measured
        .samples("ours, mean of 64 pages")?
        .median_ns();
    outcome.add(&FROM_PARKED, ours_ns, None);
    let recorded = Parked::new(machine, &Stream::new(&machine.recorded)?)?;
    let me = std::thread::current().id();
    let (taken, calls) = recorder::record(|| recorded.take());
    taken?;
    let calls = calls.iter().filter(|call| call.thread == me).count();
    outcome.add(&CALLS, calls as f64, None);
    Ok(outcome)
}
