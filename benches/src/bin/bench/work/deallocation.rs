//! Giving back, as the caller's thread sees it.

use super::one_shot::chunks_of;
use super::{Outcome, Work};
use crate::bare::{Plain, Range};
use crate::demand::{Demand, Reach};
use crate::machine::{self, Machine, time};
use crate::sides::Sides;
use anyhow::Result;
use cuda_vmm::{Engine, VirtualMemoryPool};
use std::time::{Duration, Instant};

const GIB: usize = 1 << 30;

const NAMED: Demand = Demand::time(
    "deallocate 1 GiB, caller's thread, one stream named",
    "µs",
    Reach::AtMost(20.0),
);
const UNNAMED: Demand = Demand::time(
    "deallocate 1 GiB, caller's thread, no stream named",
    "µs",
    Reach::AtMost(20.0),
);
const BARE: Demand = Demand::time(
    "deallocate 1 GiB: bare unmap and release of the same chunks",
    "µs",
    Reach::Open,
);
const PLAIN: Demand = Demand::time("deallocate 1 GiB: cuMemFree", "µs", Reach::Open);

/// Against the driver's calls, which take their time.
pub const WORK: Work = Work {
    name: "deallocate 1 GiB",
    demands: &[NAMED, UNNAMED, BARE, PLAIN],
    measure,
};

/// A round of a pool: what is freed is in use by the device until just before.
fn round(machine: &Machine, pool: &VirtualMemoryPool) -> Result<Duration> {
    let address = pool.allocate(0, GIB)?;
    // SAFETY: the page is mapped until the engine has seen that the device is past this.
    unsafe { machine.stream.memset(address, 1, machine.page_bytes) }?;
    let ((), elapsed) = time(|| pool.deallocate(0, GIB))?;
    machine.give_back(pool.engine())?;
    Ok(elapsed)
}

fn measure(machine: &Machine) -> Result<Outcome> {
    let device = &machine.device;
    let named = machine.pool(machine::options(), GIB)?;
    let engine = Engine::new(device, machine::options())?;
    let unnamed = VirtualMemoryPool::on_engine(&engine, GIB, machine.page_bytes)?;
    let chunks = chunks_of(machine, GIB)?;
    let mut range = Range::reserve(device, GIB)?;
    let mut sides = Sides::new();
    sides.add("ours, one stream named", || round(machine, &named));
    sides.add("ours, no stream named", || round(machine, &unnamed));
    sides.add("bare unmap and release", || {
        range.back(&chunks)?;
        Ok(time(|| range.give_back())?.1)
    });
    sides.add("cuMemFree", || {
        let memory = Plain::new(device, GIB)?;
        let started = Instant::now();
        drop(memory);
        Ok(started.elapsed())
    });
    let mut outcome = Outcome::new(sides.measure(&machine.settings, machine.settings.rounds * 2)?);
    for (demand, side) in [
        (&NAMED, "ours, one stream named"),
        (&UNNAMED, "ours, no stream named"),
    ] {
        outcome.add(demand, outcome.measured.median_us(side)?, None);
    }
    outcome.add_medians(&BARE, "ours, one stream named", "bare unmap and release")?;
    outcome.add_medians(&PLAIN, "ours, one stream named", "cuMemFree")?;
    Ok(outcome)
}
