//! What it costs to overwrite memory before another range may have it.

use super::{Outcome, Work};
use crate::demand::{Demand, Reach};
use crate::machine::{self, Machine, time, until};
use crate::sides::Sides;
use anyhow::Result;
use cuda_vmm::{EngineOptions, WorkerMode};
use std::time::{Duration, Instant};

const ZEROS: Demand = Demand::time(
    "scrubbing 1 GiB before it goes to the cache: the zeros alone",
    "µs",
    Reach::Open,
);
const KEPT: Demand = Demand::time(
    "1 GiB that is freed, until the cache has it, scrubbed: until the driver has it",
    "µs",
    Reach::Open,
);

/// Against giving it to the driver. Nothing is demanded: it is what hand-overs cost.
pub const WORK: Work = Work {
    name: "scrubbing",
    demands: &[ZEROS, KEPT],
    measure,
};

const GIB: usize = 1 << 30;

fn measure(machine: &Machine) -> Result<Outcome> {
    // Overwriting a simulated device's memory, which is the host's, takes seconds.
    let share = if machine.is_real() { 1 } else { 16 };
    let bytes = machine.fitting(GIB / share, 0.3, machine.page_bytes)?;
    let options = machine::options().worker(WorkerMode::Manual);
    let zeroed = machine.pool(options, bytes)?;
    let address = zeroed.allocate(0, bytes)?;
    let pool = |options: EngineOptions| machine.pool(options, bytes);
    let (kept, given) = (pool(options.cache_bytes_max(bytes))?, pool(options)?);
    let freed = |pool: &cuda_vmm::VirtualMemoryPool, kept_bytes: usize| -> Result<Duration> {
        pool.allocate(0, bytes)?;
        machine.stream.synchronize()?;
        let started = Instant::now();
        pool.deallocate(0, bytes)?;
        until(pool.engine(), "memory to go where it goes", |stats| {
            Ok(stats.committed_bytes == kept_bytes && stats.parts.cached_bytes == kept_bytes)
        })?;
        Ok(started.elapsed())
    };
    let mut sides = Sides::new();
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
    let measured = sides.measure(&machine.settings, machine.settings.rounds)?;
    let mut outcome = Outcome::new(measured);
    let zeros_us = outcome.measured.median_us("zeros over all of it")?;
    outcome.add_noted(&ZEROS, zeros_us, None, format!("{bytes} bytes"));
    outcome.add_medians(
        &KEPT,
        "ours, freed until the cache has it",
        "ours, freed until the driver has it",
    )?;
    Ok(outcome)
}
