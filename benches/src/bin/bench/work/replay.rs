//! Three models that share a pool, replayed in real time: what the pool's calls add to each step.

use super::cache::{Blocks, Cache};
use crate::bare::Plain;
use crate::machine::Machine;
use crate::traffic::Traffic;
use anyhow::Result;
use cuda_vmm::{EngineOptions, SharedMemoryPool};
use cuda_vmm_benches::program::Machine as _;
use cuda_vmm_benches::serving::{
    BLOCK_BYTES, Limits, Memory, Order, PROMPT_TOKENS, Request, Served, Server, TOKEN_BYTES,
    staggered_ramps,
};
use cuda_vmm_benches::{Outcome, SharedSizes, shared_models};
use std::time::{Duration, Instant};

const MODELS: usize = 3;
/// What is made ahead for each model: that of a few prompts.
const AHEAD_BYTES: usize = 64 * BLOCK_BYTES;
/// How much freed memory stays mapped before it goes back for the other models.
const PARK_BYTES: usize = 512 * BLOCK_BYTES;
const SECOND_NS: u64 = 1_000_000_000;
/// Eight prompts in a step, and nothing kept free for what runs.
const LIMITS: Limits = Limits {
    order: Order::Mixed,
    sequences_max: usize::MAX,
    prompt_tokens_max: 8 * PROMPT_TOKENS,
    watermark_divisor: usize::MAX,
};

/// The models' caches, and the GPU on which their steps take the time that they stand for.
struct Gpu<'a> {
    machine: &'a Machine,
    traffic: &'a Traffic<'a>,
    caches: Vec<Cache>,
    /// Blocks that were taken since the last step, and that it writes to.
    taken: Vec<u32>,
    started: Instant,
    /// How much faster than the clock the trace goes by.
    speed: f64,
    /// What is looked at when a second is over.
    pool: Option<&'a SharedMemoryPool>,
    /// The seconds that are over, and the most bytes committed at their ends.
    seen: (u64, usize),
    /// What was held over time, as text.
    lines: Vec<String>,
}

impl<'a> Gpu<'a> {
    fn new(machine: &'a Machine, traffic: &'a Traffic<'a>, caches: Vec<Cache>) -> Self {
        // In the simulator a step takes no time to speak of, and the trace goes by as fast as other
        // work is measured.
        let (seconds, patience) = (machine.replay.seconds, machine.settings.patience);
        let speed = match machine.is_real() {
            true => 1.0,
            false => (seconds / patience.as_secs_f64()).max(1.0),
        };
        Self {
            machine,
            traffic,
            caches,
            taken: Vec::new(),
            started: Instant::now(),
            speed,
            pool: None,
            seen: (0, 0),
            lines: Vec::new(),
        }
    }

    /// Serves the requests of all models, and returns what came of it.
    fn serve(&mut self, requests: &[Vec<Request>]) -> Result<Served> {
        let replay = self.machine.replay;
        let until_ns = (replay.seconds * 1e9) as u64;
        let step_ns = |prompt, decodes| {
            let time = replay.step_time(decodes, prompt as usize);
            time.as_nanos() as u64
        };
        self.started = Instant::now();
        Server::new(requests, self, LIMITS, &step_ns).run(until_ns)
    }

    /// Lets the moment be that of the clock, and notes what is held when a second is over.
    fn look_at_clock(&mut self, now_ns: &mut u64) {
        *now_ns = (self.started.elapsed().as_secs_f64() * self.speed * 1e9) as u64;
        let second = *now_ns / SECOND_NS;
        if let Some(pool) = self.pool
            && second > self.seen.0
        {
            let stats = pool.stats();
            let mib = |bytes: usize| bytes >> 20;
            let used = self
                .caches
                .iter()
                .map(|cache| mib(cache.used() * BLOCK_BYTES));
            self.lines.push(format!(
                "second {}: {} MiB committed, {} live, {} retiring, {} parked, {} ahead; used {:?}",
                self.machine.replay.window_s().0 + second as f64,
                mib(stats.committed_bytes),
                mib(stats.parts.live_page_bytes),
                mib(stats.parts.retiring_bytes),
                mib(stats.parts.parked_bytes),
                mib(stats.parts.ahead_bytes),
                used.collect::<Vec<_>>()
            ));
            self.seen = (second, self.seen.1.max(stats.committed_bytes));
        }
    }
}

impl Memory for Gpu<'_> {
    fn most_blocks(&self, model: usize) -> usize {
        self.caches[model].count()
    }

    /// As many as there are: whether there is memory for them is known when they are taken.
    fn free_blocks(&self, model: usize) -> usize {
        self.most_blocks(model)
    }

    fn take(&mut self, now_ns: &mut u64, model: usize, count: usize) -> Result<Option<Vec<u32>>> {
        let taken = self.caches[model].take(count)?;
        *now_ns += self.caches[model].own_time().as_nanos() as u64;
        self.taken.extend(taken.iter().flatten());
        Ok(taken)
    }

    fn give(&mut self, now_ns: &mut u64, model: usize, blocks: Vec<u32>) -> Result<()> {
        self.taken.retain(|block| !blocks.contains(block));
        self.caches[model].give(blocks)?;
        *now_ns += self.caches[model].own_time().as_nanos() as u64;
        Ok(())
    }

    fn step(&mut self, now_ns: &mut u64, model: usize, time_ns: u64) -> Result<()> {
        let stream = &self.machine.stream;
        for block in self.taken.drain(..) {
            let target = self.caches[model].address(block);
            // SAFETY: the block is live until it is given back, which is after this step's work:
            // the stream is synchronised below.
            unsafe { self.traffic.touch(stream, target, BLOCK_BYTES) }?;
        }
        self.traffic
            .queue_for(stream, Duration::from_nanos(time_ns))?;
        stream.synchronize()?;
        self.look_at_clock(now_ns);
        Ok(())
    }

    fn idle(&mut self, now_ns: &mut u64, time_ns: u64) -> Result<()> {
        // Nothing can come of looking all the time.
        std::thread::sleep(Duration::from_nanos(time_ns).min(Duration::from_micros(100)));
        self.look_at_clock(now_ns);
        Ok(())
    }

    fn held_bytes(&self, model: usize) -> u64 {
        (self.caches[model].used() * BLOCK_BYTES) as u64
    }
}

/// Against one buffer for all, in which all blocks have memory from the beginning.
pub fn measure(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let replay = &machine.replay;
    let traffic = Traffic::new(machine, &machine.device, &machine.stream)?;
    // All the memory that the pools share, or less on a smaller card.
    let limit_bytes = machine.fitting(replay.tokens * TOKEN_BYTES, 0.9, BLOCK_BYTES)?;
    let (from_s, to_s) = replay.window_s();
    let window_ns = (from_s * 1e9) as u64..(to_s * 1e9) as u64;
    let mut requests = staggered_ramps(MODELS as u32, replay.peak, 0);
    for requests in &mut requests {
        requests.retain(|request| window_ns.contains(&request.arrival_ns));
        requests
            .iter_mut()
            .for_each(|request| request.arrival_ns -= window_ns.start);
    }

    let engine = EngineOptions::new()
        .limit_bytes(limit_bytes)
        .park_bytes_max(PARK_BYTES)
        .chunk_bytes_max(0);
    let sizes = SharedSizes {
        page_bytes: BLOCK_BYTES,
        capacity_bytes: limit_bytes,
        ahead_bytes: AHEAD_BYTES,
    };
    let streams = vec![machine.stream.clone(); MODELS];
    let (pool, models) = shared_models(&machine.device, engine, sizes, &streams)?;
    let caches = models.into_iter().map(Cache::elastic).collect();
    let mut gpu = Gpu::new(machine, &traffic, caches);
    gpu.pool = Some(&pool);
    let ours = gpu.serve(&requests)?;
    println!(
        "\nserving replayed, three models: held over time\n{}",
        gpu.lines.join("\n")
    );
    let most_bytes = gpu.seen.1;
    let late = pool.snapshot().counters.ranges.late_prefetches;
    outcome.count("late allocations", late as f64);
    outcome.count("most bytes committed", most_bytes as f64);
    outcome.count("limit", limit_bytes as f64);
    drop(gpu);
    for name in pool.models() {
        pool.unregister_model(&name)?;
    }
    drop(pool);

    let plain = Plain::new(&machine.device, limit_bytes)?;
    let blocks = Blocks::new(limit_bytes / BLOCK_BYTES);
    let caches = (0..MODELS).map(|_| Cache::backed(&blocks, plain.address()));
    let before = Gpu::new(machine, &traffic, caches.collect()).serve(&requests)?;
    let note = format!(
        "peak {} requests/s, seconds {from_s} to {to_s} of the trace, steps of {} ms and {} ms a \
         sequence, {} ms a prompt's token; {} requests ended, at most {} sequences in a step",
        replay.peak,
        replay.step_ms,
        replay.sequence_ms,
        replay.prompt_token_ms,
        ours.served,
        ours.sequences_max
    );
    outcome.note("the pool's own time in a step", note);
    for (served, whose) in [(ours, ""), (before, ", everything allocated before")] {
        for (name, samples) in [
            ("the pool's own time in a step", served.calls),
            ("whole steps", served.steps),
            ("time to first token", served.first_token),
        ] {
            outcome.samples_of(&format!("{name}{whose}"), samples, true);
        }
        for (name, count) in [
            ("refused prompts", served.refused_prompts as f64),
            ("preemptions", served.preemptions as f64),
        ] {
            outcome.count(&format!("{name}{whose}"), count);
        }
    }
    Ok(())
}
