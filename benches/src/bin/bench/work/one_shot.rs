//! Allocating in one call, with nothing warm.

use super::{Outcome, Work};
use crate::bare::{Ordered, Plain, Range};
use crate::demand::{Demand, Reach};
use crate::machine::{self, Machine, time};
use crate::recorder;
use crate::sides::Sides;
use anyhow::Result;
use cuda_vmm::sys::DriverFunction;
use cuda_vmm::{Engine, PoolOptions, VirtualMemoryPool};
use std::time::Duration;

const GIB: usize = 1 << 30;

const ONE_HANDLE: Demand = Demand::time(
    "allocate 1 GiB in one call, nothing warm: one handle by bare calls",
    "µs",
    Reach::AtMostTimes(4.5),
);
const BY_PAGES: Demand = Demand::time(
    "allocate 1 GiB in one call, nothing warm: page at a time by bare calls",
    "µs",
    Reach::AtMostTimes(1.0 / 40.0),
);
const SINGLE_HANDLE: Demand = Demand::time(
    "allocate 1 GiB in single-handle mode, nothing warm: one handle by bare calls",
    "µs",
    Reach::AtMostTimes(1.2),
);
const PLAIN: Demand = Demand::time(
    "allocate 1 GiB in one call, nothing warm: cuMemAlloc",
    "µs",
    Reach::Open,
);
const ORDERED: Demand = Demand::time(
    "allocate 1 GiB in one call, nothing warm: cuMemAllocAsync",
    "µs",
    Reach::Open,
);

/// Against one handle, page at a time, and the driver's allocators.
pub const WORK: Work = Work {
    name: "allocate 1 GiB",
    demands: &[ONE_HANDLE, BY_PAGES, SINGLE_HANDLE, PLAIN, ORDERED],
    measure,
};

const OWN_PAGE: Demand = own("our own time in allocating one page: the same chunks by bare calls");
const OWN_64_MIB: Demand = own("our own time in allocating 64 MiB: the same chunks by bare calls");
const OWN_GIB: Demand = own("our own time in allocating 1 GiB: the same chunks by bare calls");

const fn own(name: &'static str) -> Demand {
    Demand::time(name, "µs", Reach::AtMostTimes(1.05))
}

/// Against the same chunks by bare calls.
pub const OVERHEAD: Work = Work {
    name: "our own time in allocating",
    demands: &[OWN_PAGE, OWN_64_MIB, OWN_GIB],
    measure: measure_overhead,
};

/// A pool whose memory comes from the driver and goes back to it in each round.
struct Cold<'a> {
    machine: &'a Machine,
    pool: VirtualMemoryPool,
    bytes: usize,
}

impl<'a> Cold<'a> {
    fn new(machine: &'a Machine, bytes: usize, single_handle: bool) -> Result<Self> {
        let engine = Engine::new(&machine.device, machine::options())?;
        let options = PoolOptions::new().single_handle(single_handle);
        let pool = VirtualMemoryPool::with_options(&engine, bytes, machine.page_bytes, options)?;
        pool.use_stream(&machine.stream)?;
        Ok(Self {
            machine,
            pool,
            bytes,
        })
    }

    fn round(&self) -> Result<Duration> {
        let (_, elapsed) = time(|| self.pool.allocate(0, self.bytes))?;
        self.pool.deallocate(0, self.bytes)?;
        self.machine.give_back(self.pool.engine())?;
        Ok(elapsed)
    }
}

/// A round of bare calls for chunks of these sizes.
fn bare_round(range: &mut Range, chunks: &[usize]) -> Result<Duration> {
    let ((), elapsed) = time(|| range.back(chunks))?;
    range.give_back()?;
    Ok(elapsed)
}

/// The sizes of the chunks, in order, by which a pool backs an allocation.
pub fn chunks_of(machine: &Machine, bytes: usize) -> Result<Vec<usize>> {
    let engine = Engine::new(&machine.recorded, machine::options())?;
    let pool = VirtualMemoryPool::on_engine(&engine, bytes, machine.page_bytes)?;
    let (address, calls) = recorder::record(|| pool.allocate(0, bytes));
    address?;
    pool.close()?;
    let maps = calls
        .iter()
        .filter(|call| call.function == DriverFunction::cuMemMap);
    Ok(maps.map(|call| call.bytes).collect())
}

fn measure(machine: &Machine) -> Result<Outcome> {
    let (device, stream) = (&machine.device, &machine.stream);
    let chunked = Cold::new(machine, GIB, false)?;
    let single = Cold::new(machine, GIB, true)?;
    let (mut one, mut many) = (Range::reserve(device, GIB)?, Range::reserve(device, GIB)?);
    let pages = vec![machine.page_bytes; GIB / machine.page_bytes];
    let mut sides = Sides::new();
    sides.add("ours", || chunked.round());
    sides.add("ours, single handle", || single.round());
    sides.add("one handle by bare calls", || bare_round(&mut one, &[GIB]));
    sides.add("page at a time by bare calls", || {
        bare_round(&mut many, &pages)
    });
    sides.add("cuMemAlloc", || Ok(time(|| Plain::new(device, GIB))?.1));
    sides.add("cuMemAllocAsync and synchronise", || {
        let (memory, elapsed) = time(|| {
            let memory = Ordered::new(stream, GIB)?;
            stream.synchronize()?;
            anyhow::Ok(memory)
        })?;
        drop(memory);
        stream.synchronize()?;
        Ok(elapsed)
    });
    let mut outcome = Outcome::new(sides.measure(&machine.settings, machine.settings.rounds)?);
    outcome.add_medians(&ONE_HANDLE, "ours", "one handle by bare calls")?;
    outcome.add_medians(&BY_PAGES, "ours", "page at a time by bare calls")?;
    outcome.add_medians(
        &SINGLE_HANDLE,
        "ours, single handle",
        "one handle by bare calls",
    )?;
    outcome.add_medians(&PLAIN, "ours", "cuMemAlloc")?;
    outcome.add_medians(&ORDERED, "ours", "cuMemAllocAsync and synchronise")?;
    Ok(outcome)
}

fn measure_overhead(machine: &Machine) -> Result<Outcome> {
    const MIB_64: usize = 64 << 20;
    let page_bytes = machine.page_bytes;
    let mut outcome = Outcome::default();
    // Each size by itself: what the driver does after giving back a lot would be on the account of whoever is next.
    for (demand, bytes, ours, bare) in [
        (
            &OWN_PAGE,
            page_bytes,
            "ours, one page",
            "bare calls, one page",
        ),
        (&OWN_64_MIB, MIB_64, "ours, 64 MiB", "bare calls, 64 MiB"),
        (&OWN_GIB, GIB, "ours, 1 GiB", "bare calls, 1 GiB"),
    ] {
        let cold = Cold::new(machine, bytes, false)?;
        let chunks = chunks_of(machine, bytes)?;
        let mut range = Range::reserve(&machine.device, bytes)?;
        let mut sides = Sides::new();
        sides.add(ours, || cold.round());
        sides.add(bare, || bare_round(&mut range, &chunks));
        let measured = sides.measure(&machine.settings, machine.settings.rounds * 2)?;
        outcome.measured.extend(measured);
        outcome.add_medians(demand, ours, bare)?;
    }
    Ok(outcome)
}
