//! Many ranges that grow in step, as the caches of a model's layers do.

use super::{Outcome, Work};
use crate::demand::{Demand, Reach};
use crate::kernel::Fill;
use crate::machine::{self, Machine, watch};
use crate::recorder;
use crate::samples::Samples;
use anyhow::{Context, Result};
use cuda_vmm::{DriverKind, Engine, PoolOptions, Stream, VirtualMemoryPool};
use std::time::{Duration, Instant};

const WORST: Demand = Demand::time(
    "64 ranges grow at once, prefetched, worst growth step: worst step with everything allocated before",
    "µs",
    Reach::AtMostTimes(1.2),
);
const TAIL: Demand = Demand::time(
    "64 ranges grow at once, prefetched, p99.9 of growth steps: p99.9 of steps with everything allocated before",
    "µs",
    Reach::AtMostTimes(1.2),
);
// A count, but of calls that are made where the worker was too late, which is a matter of time.
const CALLS: Demand = Demand::time(
    "64 ranges grow at once, prefetched: VMM calls on the stepping thread",
    "calls",
    Reach::AtMost(0.0),
);
const ON_DEMAND: Demand = Demand::time(
    "64 ranges grow at once, not prefetched, worst growth step: worst step with everything allocated before",
    "µs",
    Reach::Open,
);

/// Against the same steps with everything allocated before.
pub const WORK: Work = Work {
    name: "64 ranges grow at once",
    demands: &[WORST, TAIL, CALLS, ON_DEMAND],
    measure,
};

const RANGES: usize = 64;
/// The same on the simulated driver, whose memory is the host's.
const RANGES_SIMULATED: usize = 4;
/// By how much each range grows in a step, as a share of a page.
const STEPS_OF_A_PAGE: usize = 32;
/// How far each range grows in a round.
const PAGES: usize = 16;
/// What is made ahead for each range, in pages.
const PAGES_AHEAD: usize = 4;

/// How the ranges get their memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    Before,
    OnDemand,
    Ahead,
}

/// What the steps of some rounds took.
#[derive(Default)]
struct Steps {
    /// Steps in which every range needs a new page.
    growing: Vec<Duration>,
    /// All others.
    resting: Vec<Duration>,
}

/// The ranges of one round.
struct Ranges {
    pools: Vec<VirtualMemoryPool>,
    stream: Stream,
    fill: Fill,
    manner: Manner,
}

impl Ranges {
    /// Ranges in which the bytes of the first step are live.
    fn new(stream: &Stream, fill: Fill, manner: Manner) -> Result<Self> {
        let device = stream.device();
        let ranges = match device.driver().kind() {
            DriverKind::Real => RANGES,
            DriverKind::Simulated => RANGES_SIMULATED,
        };
        let page_bytes = device.granularity_bytes();
        let capacity_bytes = PAGES * page_bytes;
        let engine = Engine::new(device, machine::options())?;
        let mut pools = Vec::with_capacity(ranges);
        for _ in 0..ranges {
            let ahead_pages = match manner {
                Manner::Ahead => PAGES_AHEAD,
                Manner::Before | Manner::OnDemand => 0,
            };
            let options = PoolOptions::new().ahead_bytes_max(ahead_pages * page_bytes);
            let pool =
                VirtualMemoryPool::with_options(&engine, capacity_bytes, page_bytes, options)?;
            pool.use_stream(stream)?;
            let first_bytes = match manner {
                Manner::Before => capacity_bytes,
                Manner::OnDemand | Manner::Ahead => page_bytes / STEPS_OF_A_PAGE,
            };
            pool.allocate(0, first_bytes)?;
            pools.push(pool);
        }
        if manner == Manner::Ahead {
            // A page less for each range whose first page was made ahead before it was taken: so little is not made again.
            watch(&engine, "memory to be made ahead", |stats| {
                let least_bytes = ranges * (PAGES_AHEAD - 1) * page_bytes;
                stats.parts.filling_bytes == 0 && stats.parts.ahead_bytes >= least_bytes
            })?;
        }
        Ok(Self {
            pools,
            stream: stream.clone(),
            fill,
            manner,
        })
    }

    /// Takes all steps after the first.
    fn run(&self, steps: &mut Steps) -> Result<()> {
        let page_bytes = self.pools.first().context("no ranges")?.page_bytes();
        let step_bytes = page_bytes / STEPS_OF_A_PAGE;
        for step in 1..PAGES * STEPS_OF_A_PAGE {
            let offset = step * step_bytes;
            let started = Instant::now();
            for pool in &self.pools {
                if self.manner != Manner::Before {
                    pool.allocate(offset, step_bytes)?;
                }
                let target = pool.base_address() + offset as u64;
                // SAFETY: the bytes are live, and stay so until the stream was synchronised.
                unsafe { self.fill.launch(&self.stream, target, step_bytes) }?;
            }
            self.stream.synchronize()?;
            let elapsed = started.elapsed();
            match offset.is_multiple_of(page_bytes) {
                true => steps.growing.push(elapsed),
                false => steps.resting.push(elapsed),
            }
        }
        Ok(())
    }
}

/// VMM calls that this thread makes while prefetched ranges grow.
fn calls_while_stepping(machine: &Machine) -> Result<usize> {
    let stream = Stream::new(&machine.recorded)?;
    let ranges = Ranges::new(&stream, Fill::new(&machine.recorded)?, Manner::Ahead)?;
    let me = std::thread::current().id();
    let (ran, calls) = recorder::record(|| ranges.run(&mut Steps::default()));
    ran?;
    let mine = calls.iter().filter(|call| call.thread == me);
    Ok(mine.filter(|call| call.is_memory_management()).count())
}

fn measure(machine: &Machine) -> Result<Outcome> {
    let fill = Fill::new(&machine.device)?;
    let manners = [Manner::Before, Manner::Ahead, Manner::OnDemand];
    let mut steps = manners.map(|_| Steps::default());
    // Longer than other work: the thousandth of the growth steps is to be more than the worst of them.
    let settings = machine.settings.patient(8);
    let started = Instant::now();
    for round in 0..settings.rounds {
        if round >= settings.rounds_min && started.elapsed() > settings.patience {
            break;
        }
        for turn in 0..manners.len() {
            let side = (round + turn) % manners.len();
            // Nothing is demanded on demand, so a few rounds tell enough.
            if manners[side] == Manner::OnDemand && round % 8 != 0 {
                continue;
            }
            let ranges = Ranges::new(&machine.stream, fill, manners[side])?;
            ranges.run(&mut steps[side])?;
        }
    }
    let [before, ahead, on_demand] = steps;
    let before_growing: Samples = before.growing.iter().copied().collect();
    let before: Samples = before.growing.into_iter().chain(before.resting).collect();
    let on_demand = Samples::from_iter(on_demand.growing);
    let mut outcome = Outcome::default();
    let worst_us = before.max_ns() / 1e3;
    let ahead_resting = Samples::from_iter(ahead.resting);
    let ahead = Samples::from_iter(ahead.growing);
    outcome.add(&WORST, ahead.max_ns() / 1e3, Some(worst_us));
    let tail_us = |samples: &Samples| samples.quantile_ns(999) / 1e3;
    outcome.add(&TAIL, tail_us(&ahead), Some(tail_us(&before)));
    outcome.measured.push("growth steps, prefetched", ahead);
    let others = "steps between them, prefetched";
    outcome.measured.push(others, ahead_resting);
    let calls = calls_while_stepping(machine)?;
    outcome.add(&CALLS, calls as f64, None);
    outcome.add(&ON_DEMAND, on_demand.max_ns() / 1e3, Some(worst_us));
    outcome
        .measured
        .push("growth steps, not prefetched", on_demand);
    let same = "the same steps, everything allocated before";
    outcome.measured.push(same, before_growing);
    outcome
        .measured
        .push("all steps, everything allocated before", before);
    Ok(outcome)
}
