//! What it costs to copy within memory, and to overwrite it before another range may have it.

use crate::bare::{Plain, Range};
use crate::machine::Machine;
use anyhow::Result;
use cuda_vmm::{EngineOptions, VirtualMemoryPool, WorkerMode};
use cuda_vmm_benches::{Outcome, Sides, step_until, time};
use std::time::Instant;

const COPY_COUNT: u32 = 4;

/// Copies within chunks, against memory of `cuMemAlloc`, and against a chunk for each page.
pub fn copies(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    // Every byte of a simulated device takes memory of the host.
    let wanted_bytes = if machine.is_real() { 8 << 30 } else { 64 << 20 };
    let page_bytes = machine.page_bytes;
    // There are four of them.
    let bytes = machine.fitting(wanted_bytes, 0.2, 2 * page_bytes)?;
    let plain = Plain::new(&machine.device, bytes)?;
    let at_once = machine.pool(EngineOptions::new(), bytes)?;
    at_once.allocate(0, bytes)?;
    let grown = machine.pool(EngineOptions::new(), bytes)?;
    for offset in (0..bytes).step_by(page_bytes) {
        grown.allocate(offset, page_bytes)?;
    }
    let mut pages = Range::reserve(&machine.device, bytes)?;
    pages.back(&vec![page_bytes; bytes / page_bytes])?;
    let mut sides = Sides::default();
    for (name, address) in [
        ("cuMemAlloc", plain.address()),
        ("ours, asked at once", at_once.base_address()),
        ("ours, grown page by page", grown.base_address()),
        ("page at a time by bare calls", pages.address),
    ] {
        // A copy reads one half and writes the other.
        sides.add_rate(name, bytes as f64, move || {
            let half = bytes / 2;
            let ((), elapsed) = time(|| {
                for _ in 0..COPY_COUNT {
                    // SAFETY: all of the memory is mapped until the stream was synchronised, below.
                    unsafe { machine.stream.copy(address, address + half as u64, half) }?;
                }
                machine.stream.synchronize()
            })?;
            Ok(elapsed / COPY_COUNT)
        });
        outcome.note(name, format!("{bytes} bytes"));
    }
    outcome.measure(sides, &machine.settings, machine.settings.rounds)
}

/// Against giving memory to the driver. Nothing is demanded: it is what hand-overs cost.
pub fn scrubbing(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    // Overwriting a simulated device's memory, which is the host's, takes seconds.
    let wanted_bytes = if machine.is_real() { 1 << 30 } else { 64 << 20 };
    let bytes = machine.fitting(wanted_bytes, 0.3, machine.page_bytes)?;
    let options = EngineOptions::new().worker(WorkerMode::Manual);
    let zeroed = machine.pool(options, bytes)?;
    let address = zeroed.allocate(0, bytes)?;
    let kept = machine.pool(options.cache_bytes_max(bytes), bytes)?;
    let given = machine.pool(options, bytes)?;
    let freed = |pool: &VirtualMemoryPool, kept_bytes: usize| {
        pool.allocate(0, bytes)?;
        machine.stream.synchronize()?;
        let started = Instant::now();
        pool.deallocate(0, bytes)?;
        step_until(pool.engine(), "memory to go where it goes", |stats| {
            Ok(stats.committed_bytes == kept_bytes && stats.parts.cached_bytes == kept_bytes)
        })?;
        Ok(started.elapsed())
    };
    let mut sides = Sides::default();
    sides.add("zeros over all of it", || {
        let zeros = || {
            // SAFETY: live and mapped until the pool is dropped, which waits for the stream.
            unsafe { machine.stream.memset(address, 0, bytes) }?;
            machine.stream.synchronize()
        };
        Ok(time(zeros)?.1)
    });
    sides.add("ours, freed until the cache has it", || freed(&kept, bytes));
    sides.add("ours, freed until the driver has it", || freed(&given, 0));
    outcome.note("zeros over all of it", format!("{bytes} bytes"));
    outcome.measure(sides, &machine.settings, machine.settings.rounds)
}
