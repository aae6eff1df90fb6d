//! Many ranges that grow in step, as the caches of a model's layers do.

use crate::kernel::Fill;
use crate::machine::{Machine, watch};
use crate::recorder;
use anyhow::{Context, Result};
use cuda_vmm::{DriverKind, Engine, EngineOptions, PoolOptions, Stream, VirtualMemoryPool};
use cuda_vmm_benches::Outcome;
use std::time::{Duration, Instant};

const RANGES: usize = 64;
/// The same on the simulated driver, whose memory is the host's.
const RANGES_SIMULATED: usize = 4;
/// By how much each range grows in a step, as a share of a page.
const STEPS_OF_A_PAGE: usize = 32;
/// How far each range grows in a round.
const PAGES: usize = 16;
/// What is made ahead for each range, in pages.
const PAGES_AHEAD: usize = 4;

/// How the ranges get their memory: all before, or as they grow, perhaps made ahead.
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
        let engine = Engine::new(device, EngineOptions::new())?;
        let mut pools = Vec::with_capacity(ranges);
        for _ in 0..ranges {
            let ahead_bytes = usize::from(manner == Manner::Ahead) * PAGES_AHEAD * page_bytes;
            let options = PoolOptions::new().ahead_bytes_max(ahead_bytes);
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
            // A page less for each range whose first page was made ahead before it was taken: so
            // little is not made again.
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

/// Against the same steps with everything allocated before.
pub fn measure(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let fill = Fill::new(&machine.device)?;
    let manners = [Manner::Before, Manner::Ahead, Manner::OnDemand];
    let mut steps = manners.map(|_| Steps::default());
    // Longer than other work: the thousandth of the growth steps is to be more than the worst of
    // them.
    let settings = machine.settings.patient(8);
    for (round, side) in settings.turns(manners.len(), settings.rounds, 0) {
        // Nothing is demanded on demand, so a few rounds tell enough.
        if manners[side] == Manner::OnDemand && round % 8 != 0 {
            continue;
        }
        let ranges = Ranges::new(&machine.stream, fill, manners[side])?;
        ranges.run(&mut steps[side])?;
    }
    let [before, ahead, on_demand] = steps;
    outcome.times("growth steps, prefetched", ahead.growing);
    outcome.times("steps between them, prefetched", ahead.resting);
    outcome.times("growth steps, not prefetched", on_demand.growing);
    let all = before.growing.iter().chain(&before.resting).copied();
    outcome.times("all steps, everything allocated before", all);
    outcome.times(
        "the same steps, everything allocated before",
        before.growing,
    );

    let stream = Stream::new(&machine.recorded)?;
    let ranges = Ranges::new(&stream, Fill::new(&machine.recorded)?, Manner::Ahead)?;
    let (ran, calls) = recorder::record(|| ranges.run(&mut Steps::default()));
    let calls = calls.iter().filter(|call| call.is_memory_management());
    outcome.count("VMM calls", calls.count() as f64);
    ran
}
