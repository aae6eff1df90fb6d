//! Many ranges that grow in step, as the caches of a model's layers do.

use crate::machine::{Machine, range};
use crate::traffic::Kernel;
use anyhow::Result;
use cuda_vmm::{DriverKind, Engine, EngineOptions, PoolOptions, Stream, VirtualMemoryPool};
use cuda_vmm_benches::{MEMORY_MANAGEMENT, Outcome, count_of, noted_calls, watch};
use std::time::Instant;

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

struct Ranges<'a> {
    pools: Vec<VirtualMemoryPool>,
    stream: &'a Stream,
    manner: Manner,
}

impl<'a> Ranges<'a> {
    /// Ranges in which the bytes of the first step are live.
    fn new(stream: &'a Stream, manner: Manner) -> Result<Self> {
        let device = stream.device();
        let is_real = device.driver().kind() == DriverKind::Real;
        let ranges = if is_real { RANGES } else { RANGES_SIMULATED };
        let page_bytes = device.granularity_bytes();
        let (ahead_bytes, first_bytes) = match manner {
            Manner::Before => (0, PAGES * page_bytes),
            Manner::OnDemand => (0, page_bytes / STEPS_OF_A_PAGE),
            Manner::Ahead => (PAGES_AHEAD * page_bytes, page_bytes / STEPS_OF_A_PAGE),
        };
        let engine = Engine::new(device, EngineOptions::new())?;
        let options = PoolOptions::new().ahead_bytes_max(ahead_bytes);
        let mut pools = Vec::with_capacity(ranges);
        for _ in 0..ranges {
            let pool = range(&engine, PAGES * page_bytes, options, stream)?;
            pool.allocate(0, first_bytes)?;
            pools.push(pool);
        }
        if manner == Manner::Ahead {
            // A page less for each range whose first was made ahead: so little is not made again.
            watch(&engine, "memory to be made ahead", |stats| {
                let least_bytes = ranges * (PAGES_AHEAD - 1) * page_bytes;
                stats.parts.filling_bytes == 0 && stats.parts.ahead_bytes >= least_bytes
            })?;
        }
        Ok(Self {
            pools,
            stream,
            manner,
        })
    }

    /// Takes all steps after the first. Those that need new pages count; with memory before, all do.
    fn run(&self, kernel: Kernel, times: &mut Vec<f64>) -> Result<()> {
        let page_bytes = self.stream.device().granularity_bytes();
        let step_bytes = page_bytes / STEPS_OF_A_PAGE;
        for offset in (step_bytes..PAGES * page_bytes).step_by(step_bytes) {
            let started = Instant::now();
            for pool in &self.pools {
                if self.manner != Manner::Before {
                    pool.allocate(offset, step_bytes)?;
                }
                let target = pool.base_address() + offset as u64;
                // SAFETY: the bytes are live, and stay so until the stream was synchronised.
                unsafe { kernel.write(self.stream, target, step_bytes, step_bytes) }?;
            }
            self.stream.synchronize()?;
            let elapsed = started.elapsed();
            if self.manner == Manner::Before || offset.is_multiple_of(page_bytes) {
                times.push(elapsed.as_nanos() as f64);
            }
        }
        Ok(())
    }
}

/// Against the same steps with everything allocated before.
pub fn measure(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let kernel = Kernel::load(&machine.device)?;
    let manners = [Manner::Before, Manner::Ahead, Manner::OnDemand];
    let mut times = manners.map(|_| Vec::new());
    // Longer than other work, as a thousandth of the steps is to be more than the worst one.
    let settings = machine.settings.patient(8);
    for (round, side) in settings.turns(manners.len(), settings.rounds, 0) {
        // Nothing is demanded on demand, so a few rounds tell enough.
        if manners[side] == Manner::OnDemand && round % 8 != 0 {
            continue;
        }
        Ranges::new(&machine.stream, manners[side])?.run(kernel, &mut times[side])?;
    }
    let [before, ahead, on_demand] = times;
    outcome.times("growth steps, prefetched", ahead);
    outcome.times("growth steps, not prefetched", on_demand);
    outcome.times("all steps, everything allocated before", before);

    let kernel = Kernel::load(machine.noted.device())?;
    let ranges = Ranges::new(&machine.noted, Manner::Ahead)?;
    let (ran, calls) = noted_calls(|| ranges.run(kernel, &mut Vec::new()));
    outcome.count("VMM calls", count_of(&calls, &MEMORY_MANAGEMENT) as f64);
    ran
}
