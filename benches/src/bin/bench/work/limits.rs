//! Asking for more than there is.

use super::{Outcome, Work};
use crate::demand::{Demand, Reach};
use crate::machine::{self, Machine};
use crate::sides::Sides;
use anyhow::{Result, ensure};
use cuda_vmm::{EngineStats, VirtualMemoryPool};
use std::time::Instant;

const GIB: usize = 1 << 30;

const REFUSED_TIME: Demand = Demand::time(
    "a request for 127 GiB, or half more than the card has, is refused",
    "µs",
    Reach::AtMost(10.0),
);
const REFUSED_HELD: Demand = Demand::count(
    "a request for 127 GiB, or half more than the card has, is refused: bytes held after",
    "bytes",
    Reach::AtMost(0.0),
);

/// A request that the budget cannot meet.
pub const REFUSED: Work = Work {
    name: "a request that cannot fit",
    demands: &[REFUSED_TIME, REFUSED_HELD],
    measure: measure_refused,
};

const FILLED_LOST: Demand = Demand::count(
    "fill the card until OUT_OF_MEMORY: bytes lost by the request that failed",
    "bytes",
    Reach::AtMost(0.0),
);
const FILLED_FREE: Demand = Demand::count(
    "fill the card until OUT_OF_MEMORY: bytes that cuMemGetInfo misses after all is given back",
    "bytes",
    Reach::AtMost(0.0),
);

/// Requests until the driver has no more.
pub const FILLED: Work = Work {
    name: "fill the card until OUT_OF_MEMORY",
    demands: &[FILLED_LOST, FILLED_FREE],
    measure: measure_filled,
};

fn measure_refused(machine: &Machine) -> Result<Outcome> {
    let total_bytes = machine.device.total_bytes();
    let bytes = match total_bytes < 100 * GIB {
        true => 127 * GIB,
        false => total_bytes / GIB * GIB * 3 / 2,
    };
    let pool = machine.pool(machine::options(), bytes)?;
    let mut sides = Sides::new();
    sides.add("ours", || {
        let started = Instant::now();
        let outcome = pool.allocate(0, bytes);
        let elapsed = started.elapsed();
        ensure!(
            outcome.is_err_and(|error| error.is_out_of_memory()),
            "{bytes} bytes were not refused"
        );
        Ok(elapsed)
    });
    let mut outcome = Outcome::new(sides.measure(&machine.settings, machine.settings.rounds * 10)?);
    outcome.add(&REFUSED_TIME, outcome.measured.median_us("ours")?, None);
    let held_bytes = pool.engine().stats().committed_bytes;
    outcome.add(&REFUSED_HELD, held_bytes as f64, None);
    Ok(outcome)
}

/// Allocates GiB after GiB until the driver has no more; the engine's numbers before and after the failure.
fn fill(pool: &VirtualMemoryPool) -> Result<(EngineStats, EngineStats)> {
    for offset in (0..pool.capacity_bytes()).step_by(GIB) {
        let before = pool.engine().stats();
        match pool.allocate(offset, GIB) {
            Ok(_) => {}
            Err(error) if error.is_out_of_memory() => return Ok((before, pool.engine().stats())),
            Err(error) => return Err(error.into()),
        }
    }
    anyhow::bail!("the driver never ran out of memory")
}

fn measure_filled(machine: &Machine) -> Result<Outcome> {
    // A budget beyond what the card has, so that the driver and not the budget refuses.
    let limit_bytes = 2 * machine.device.total_bytes().next_multiple_of(GIB);
    let options = machine::options().limit_bytes(limit_bytes);
    let (mut lost_bytes, mut missing_bytes) = (0, 0);
    let mut free_bytes = None;
    for _ in 0..3 {
        let pool = machine.pool(options, limit_bytes)?;
        let (before, after) = fill(&pool)?;
        ensure!(
            before.parts.live_page_bytes == after.parts.live_page_bytes,
            "what was live before the failure is not live after it"
        );
        lost_bytes = lost_bytes.max(after.committed_bytes.saturating_sub(before.committed_bytes));
        pool.close()?;
        let now_bytes = machine.device.free_bytes()?;
        // The first time the driver may make tables of its own, which it keeps.
        let first_bytes = *free_bytes.get_or_insert(now_bytes);
        missing_bytes = missing_bytes.max(first_bytes.saturating_sub(now_bytes));
    }
    let mut outcome = Outcome::default();
    outcome.add(&FILLED_LOST, lost_bytes as f64, None);
    outcome.add(&FILLED_FREE, missing_bytes as f64, None);
    Ok(outcome)
}
