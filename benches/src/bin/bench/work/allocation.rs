//! Allocating in one call with nothing warm, freeing, and tearing down, against bare calls.

use crate::bare::{Plain, Range, ordered_round};
use crate::machine::{Machine, range};
use anyhow::Result;
use cuda_vmm::sys::DriverFunction;
use cuda_vmm::{Engine, EngineOptions, PoolOptions, VirtualMemoryPool};
use cuda_vmm_benches::{Outcome, Sides, drop_time, noted_calls, time};
use std::time::Duration;

const GIB: usize = 1 << 30;

/// A round of a pool whose memory comes from the driver and goes back to it.
fn cold_round(machine: &Machine, pool: &VirtualMemoryPool) -> Result<Duration> {
    let bytes = pool.capacity_bytes();
    let (_, elapsed) = time(|| pool.allocate(0, bytes))?;
    pool.deallocate(0, bytes)?;
    machine.give_back(pool.engine())?;
    Ok(elapsed)
}

/// The sizes of the chunks, in order, by which a pool backs an allocation.
fn chunks_of(machine: &Machine, bytes: usize) -> Result<Vec<usize>> {
    let pool = VirtualMemoryPool::new(machine.noted.device(), bytes, machine.page_bytes)?;
    let (address, calls) = noted_calls(|| pool.allocate(0, bytes));
    address?;
    pool.close()?;
    let maps = calls.into_iter();
    let maps = maps.filter(|(function, _)| *function == DriverFunction::cuMemMap);
    Ok(maps.map(|(_, bytes)| bytes).collect())
}

/// Against one handle, page at a time, and the driver's allocators.
pub fn one_call(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let (device, stream) = (&machine.device, &machine.stream);
    let chunked = machine.pool(EngineOptions::new(), GIB)?;
    let engine = Engine::new(device, EngineOptions::new())?;
    let single = range(&engine, GIB, PoolOptions::new().single_handle(true), stream)?;
    let (mut one, mut many) = (Range::reserve(device, GIB)?, Range::reserve(device, GIB)?);
    let pages = vec![machine.page_bytes; GIB / machine.page_bytes];
    let mut sides = Sides::default();
    sides.add("ours", || cold_round(machine, &chunked));
    sides.add("ours, single handle", || cold_round(machine, &single));
    sides.add("one handle by bare calls", || one.round(&[GIB]));
    sides.add("page at a time by bare calls", || many.round(&pages));
    sides.add("cuMemAlloc", || Ok(time(|| Plain::new(device, GIB))?.1));
    let ordered = || ordered_round(stream, GIB);
    sides.add("cuMemAllocAsync and synchronise", ordered);
    outcome.measure(sides, &machine.settings, machine.settings.rounds)
}

/// Against the same chunks by bare calls.
pub fn overhead(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    // Each size by itself: what the driver does after much was freed would delay the next side.
    let sizes = [machine.page_bytes, 64 << 20, GIB];
    for (size, bytes) in ["one page", "64 MiB", "1 GiB"].into_iter().zip(sizes) {
        let pool = machine.pool(EngineOptions::new(), bytes)?;
        let chunks = chunks_of(machine, bytes)?;
        let mut range = Range::reserve(&machine.device, bytes)?;
        let mut sides = Sides::default();
        sides.add(&format!("ours, {size}"), || cold_round(machine, &pool));
        sides.add(&format!("bare calls, {size}"), || range.round(&chunks));
        outcome.measure(sides, &machine.settings, machine.settings.rounds * 2)?;
    }
    Ok(())
}

/// Against the driver's calls, which take their time.
pub fn deallocation(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let device = &machine.device;
    let named = machine.pool(EngineOptions::new(), GIB)?;
    let unnamed = VirtualMemoryPool::new(device, GIB, machine.page_bytes)?;
    let chunks = chunks_of(machine, GIB)?;
    let mut range = Range::reserve(device, GIB)?;
    // What is freed is in use by the device until just before.
    let round = |pool: &VirtualMemoryPool| {
        let address = pool.allocate(0, GIB)?;
        // SAFETY: the page is mapped until the engine has seen that the device is past this.
        unsafe { machine.stream.memset(address, 1, machine.page_bytes) }?;
        let ((), elapsed) = time(|| pool.deallocate(0, GIB))?;
        machine.give_back(pool.engine())?;
        Ok(elapsed)
    };
    let mut sides = Sides::default();
    sides.add("ours, one stream named", || round(&named));
    sides.add("ours, no stream named", || round(&unnamed));
    sides.add("bare unmap and release", || range.release(&chunks));
    sides.add("cuMemFree", || Ok(drop_time(Plain::new(device, GIB)?)));
    outcome.measure(sides, &machine.settings, machine.settings.rounds * 2)
}

/// Against bare calls for the same chunks.
pub fn tear_down(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let bytes = machine.fitting(64 << 30, 0.95, GIB)?;
    let chunks = chunks_of(machine, bytes)?;
    let mut range = Range::reserve(&machine.device, bytes)?;
    let mut sides = Sides::default();
    sides.add("ours", || {
        let pool = machine.pool(EngineOptions::new(), bytes)?;
        pool.allocate(0, bytes)?;
        Ok(time(|| pool.close())?.1)
    });
    sides.add("bare unmap and release", || range.release(&chunks));
    let note = format!("{} GiB in {} chunks", bytes >> 30, chunks.len());
    outcome.note("ours", note);
    // The bare calls alone spread by a sixth: medians of some thirty rounds would differ by more
    // than the reach. A round takes a third of a second, most of it to fill the range again.
    let settings = machine.settings.patient(4);
    outcome.measure(sides, &settings, settings.rounds.div_ceil(2))
}
