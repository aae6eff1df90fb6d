//! Asking for more than there is, and what is held without being live.

use crate::machine::Machine;
use anyhow::{Context, Result, bail, ensure};
use cuda_vmm::{EngineOptions, EngineStats, VirtualMemoryPool};
use cuda_vmm_benches::{Filling, Outcome, Sides, bookkeeping_memory, time};

const GIB: usize = 1 << 30;

/// A request that the budget cannot meet.
pub fn refused(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let bytes = (machine.device.total_bytes() / GIB * GIB * 3 / 2).max(127 * GIB);
    let pool = machine.pool(EngineOptions::new(), bytes)?;
    let mut sides = Sides::default();
    sides.add("ours", || {
        let (asked, elapsed) = time(|| anyhow::Ok(pool.allocate(0, bytes)))?;
        let is_refused = asked.is_err_and(|error| error.is_out_of_memory());
        ensure!(is_refused, "{bytes} bytes were not refused");
        Ok(elapsed)
    });
    outcome.measure(sides, &machine.settings, machine.settings.rounds * 10)?;
    let held_bytes = pool.engine().stats().committed_bytes;
    outcome.count("bytes held after", held_bytes as f64);
    Ok(())
}

/// Allocates until the driver has no more; the engine's numbers before and after the failure.
fn fill(pool: &VirtualMemoryPool) -> Result<(EngineStats, EngineStats)> {
    for offset in (0..pool.capacity_bytes()).step_by(GIB) {
        let before = pool.engine().stats();
        if let Err(error) = pool.allocate(offset, GIB) {
            ensure!(error.is_out_of_memory(), error);
            return Ok((before, pool.engine().stats()));
        }
    }
    bail!("the driver never ran out of memory")
}

/// Requests until the driver has no more.
pub fn filled(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    // A budget beyond what the card has, so that the driver and not the budget refuses.
    let limit_bytes = 2 * machine.device.total_bytes().next_multiple_of(GIB);
    let options = EngineOptions::new().limit_bytes(limit_bytes);
    let (mut lost_bytes, mut missing_bytes) = (0, 0);
    let mut free_bytes = None;
    for _ in 0..3 {
        let pool = machine.pool(options, limit_bytes)?;
        let (before, after) = fill(&pool)?;
        let is_kept = before.parts.live_page_bytes == after.parts.live_page_bytes;
        ensure!(is_kept, "what was live is not after the failure");
        lost_bytes = lost_bytes.max(after.committed_bytes.saturating_sub(before.committed_bytes));
        pool.close()?;
        let now_bytes = machine.device.free_bytes()?;
        // The first time the driver may make tables of its own, which it keeps.
        let first_bytes = *free_bytes.get_or_insert(now_bytes);
        missing_bytes = missing_bytes.max(first_bytes.saturating_sub(now_bytes));
    }
    outcome.count("bytes lost", lost_bytes as f64);
    outcome.count("bytes missing", missing_bytes as f64);
    Ok(())
}

/// What is held without being live, against what is allowed.
pub fn slack(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    const BYTES: usize = 2 << 30;
    let page_bytes = machine.page_bytes;
    let mut pool = machine.pool(EngineOptions::new(), BYTES)?;
    let now = |pool: &VirtualMemoryPool| {
        let stats = pool.stats();
        let allowed_bytes = stats.parts.live_page_bytes as f64 / 8.0 + stats.page_bytes as f64;
        (stats.parts.slack_bytes as f64, allowed_bytes)
    };
    let mut worst = (0.0, page_bytes as f64);
    // Steps that end within pages.
    let step_bytes = page_bytes * 3 / 4;
    let mut end = 0;
    while end + step_bytes <= BYTES {
        pool.allocate(end, step_bytes)?;
        end += step_bytes;
        let now = now(&pool);
        if now.0 / now.1 > worst.0 / worst.1 {
            worst = now;
        }
    }
    outcome.count("slack of growth", worst.0);
    outcome.count("allowed in growth", worst.1);
    // Of every eight pages one stays, so that most of each chunk is slack.
    for hole in (0..end / page_bytes - 8).step_by(8) {
        pool.deallocate((hole + 1) * page_bytes, 7 * page_bytes)?;
    }
    machine.stream.synchronize()?;
    pool.compact()?;
    let (slack_bytes, allowed_bytes) = now(&pool);
    outcome.count("slack after compact()", slack_bytes);
    outcome.count("allowed after compact()", allowed_bytes);
    Ok(())
}

/// The host memory that bookkeeping takes, against what is allowed.
pub fn bookkeeping(_: &Machine, outcome: &mut Outcome) -> Result<()> {
    let share = |one: &Filling| one.held_bytes as f64 / one.allowed_bytes() as f64;
    let fillings = bookkeeping_memory()?.into_iter();
    let worst = fillings.max_by(|one, other| share(one).total_cmp(&share(other)));
    let worst = worst.context("nothing is filled")?;
    let mapped = worst.mapped_bytes;
    let note = format!("{mapped} bytes mapped, on a driver that does nothing");
    outcome.note("held", note);
    outcome.count("held", worst.held_bytes as f64);
    outcome.count("allowed", worst.allowed_bytes() as f64);
    Ok(())
}
