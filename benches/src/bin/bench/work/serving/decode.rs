//! 128 sequences of one model that grow, each by a token in a step.

use super::TOKEN_BYTES;
use super::cache::{Blocks, Cache};
use crate::bare::Plain;
use crate::demand::{Demand, Reach};
use crate::machine::{self, Machine};
use crate::recorder::{self, Call};
use crate::samples::Samples;
use crate::traffic::Traffic;
use crate::work::{Outcome, Work};
use anyhow::{Context, Result};
use cuda_vmm::sys::DriverFunction;
use cuda_vmm::{Device, ModelOptions, SharedMemoryPool, SharedPoolOptions, Stream};
use std::time::{Duration, Instant};

const OWN: Demand = Demand::time(
    "128 sequences grow, serving: the pool's own time in a decode step, p99",
    "µs",
    Reach::AtMost(50.0),
);
const OWN_WORST: Demand = Demand::time(
    "128 sequences grow, serving: the pool's own time in a decode step, worst",
    "µs",
    Reach::Open,
);
// A count, but of calls that are made where the worker was too late, which is a matter of time.
const CALLS: Demand = Demand::time(
    "128 sequences grow, serving: VMM calls on the stepping thread",
    "calls",
    Reach::AtMost(0.0),
);
const RECORDS: Demand = Demand::count(
    "128 sequences grow, serving: event records on the stepping thread, most in a step",
    "calls",
    Reach::AtMost(1.0),
);
const WHOLE: Demand = Demand::time(
    "128 sequences grow, serving: whole decode step, p99: with everything allocated before",
    "ms",
    Reach::Open,
);

/// Against the same steps with everything allocated before.
pub const WORK: Work = Work {
    name: "128 sequences grow, serving",
    demands: &[OWN, OWN_WORST, CALLS, RECORDS, WHOLE],
    measure,
};

const SEQUENCES: usize = 128;
/// Tokens after which a sequence ends and another begins in its place.
const TOKENS: usize = 256;
/// The first 256 steps take memory that nobody had, the others what was freed.
const STEPS: usize = 2 * TOKENS;
/// Memory traffic of a step: the weights of an 8B model, read once.
const STEP_BYTES: usize = 16 << 30;
/// What is made ahead, in pages: that of some steps.
const PAGES_AHEAD: usize = 64;

/// What one step took.
struct Step {
    own_time: Duration,
    whole_time: Duration,
}

/// A model that decodes.
struct Decode<'a> {
    cache: Cache,
    /// For each sequence, how many tokens it has, and its blocks.
    sequences: Vec<(usize, Vec<usize>)>,
    tokens_of_a_block: usize,
    stream: Stream,
    traffic: &'a Traffic<'a>,
    page_bytes: usize,
}

impl<'a> Decode<'a> {
    /// Sequences that have begun at different times, so that in each step as many need a new block.
    fn new(
        mut cache: Cache,
        stream: &Stream,
        traffic: &'a Traffic<'a>,
        page_bytes: usize,
    ) -> Result<Self> {
        let tokens_of_a_block = (page_bytes / TOKEN_BYTES).max(1);
        let mut sequences = Vec::with_capacity(SEQUENCES);
        for index in 0..SEQUENCES {
            let tokens = index % tokens_of_a_block;
            let blocks = cache.take(tokens.min(1))?.context("no room to begin")?;
            sequences.push((tokens, blocks));
        }
        cache.await_ahead(PAGES_AHEAD * page_bytes)?;
        cache.own_time();
        Ok(Self {
            cache,
            sequences,
            tokens_of_a_block,
            stream: stream.clone(),
            traffic,
            page_bytes,
        })
    }

    /// Ends what has all its tokens, and makes one token of each sequence.
    fn step(&mut self) -> Result<Step> {
        let started = Instant::now();
        let mut ended = Vec::new();
        for (tokens, blocks) in &mut self.sequences {
            if *tokens == TOKENS {
                *tokens = 0;
                ended.append(blocks);
            }
        }
        self.cache.give(ended)?;
        for (tokens, blocks) in &mut self.sequences {
            if tokens.is_multiple_of(self.tokens_of_a_block) {
                let taken = self.cache.take(1)?.context("the pool has no room")?;
                for block in &taken {
                    let target = self.cache.address(*block);
                    // SAFETY: the block is live until its sequence ends, which is after this step's work.
                    unsafe { self.traffic.touch(&self.stream, target, self.page_bytes) }?;
                }
                blocks.extend(taken);
            }
            *tokens += 1;
        }
        self.traffic.queue(&self.stream, STEP_BYTES)?;
        self.stream.synchronize()?;
        Ok(Step {
            own_time: self.cache.own_time().0,
            whole_time: started.elapsed(),
        })
    }
}

/// Blocks that all sequences together have at most.
fn blocks_max(page_bytes: usize) -> usize {
    let tokens_of_a_block = (page_bytes / TOKEN_BYTES).max(1);
    SEQUENCES * TOKENS.div_ceil(tokens_of_a_block)
}

/// A model of a shared pool with memory made ahead; freed memory stays mapped, as the model is alone.
fn elastic(device: &Device, stream: &Stream) -> Result<Cache> {
    let page_bytes = device.granularity_bytes();
    let limit_bytes = (blocks_max(page_bytes) + PAGES_AHEAD) * page_bytes;
    let engine = machine::options()
        .limit_bytes(limit_bytes)
        .park_bytes_max(limit_bytes)
        .chunk_bytes_max(0);
    let options = SharedPoolOptions::new()
        .engine(engine)
        .page_bytes(page_bytes);
    let pool = SharedMemoryPool::with_options(device, options)?;
    let mut options = ModelOptions::new(limit_bytes);
    options.ahead_bytes_max = PAGES_AHEAD * page_bytes;
    pool.register_model_with("model", options)?;
    let model = pool.model("model")?;
    model.use_stream(stream)?;
    Ok(Cache::elastic(model))
}

/// The steps with their calls noted: how many VMM calls this thread makes in all, and how many event records in a step at most.
fn calls_while_stepping(machine: &Machine) -> Result<(usize, usize)> {
    let stream = Stream::new(&machine.recorded)?;
    let traffic = Traffic::new(machine, &machine.recorded, &stream)?;
    let cache = elastic(&machine.recorded, &stream)?;
    let mut decode = Decode::new(cache, &stream, &traffic, machine.page_bytes)?;
    let me = std::thread::current().id();
    let (mut calls, mut records) = (0, 0);
    for _ in 0..STEPS {
        let (stepped, made) = recorder::record(|| decode.step());
        stepped?;
        let mine = || made.iter().filter(|call| call.thread == me);
        let is_record = |call: &&Call| {
            matches!(
                call.function,
                DriverFunction::cuEventRecord | DriverFunction::cuCtxRecordEvent
            )
        };
        calls += mine().filter(|call| call.is_memory_management()).count();
        records = records.max(mine().filter(is_record).count());
    }
    Ok((calls, records))
}

fn measure(machine: &Machine) -> Result<Outcome> {
    let (stream, page_bytes) = (&machine.stream, machine.page_bytes);
    let traffic = Traffic::new(machine, &machine.device, stream)?;
    let blocks = blocks_max(page_bytes);
    let plain = Plain::new(&machine.device, blocks * page_bytes)?;
    // Own times with the pool, and whole steps with the pool and without.
    let (mut own, mut with, mut without) = (Vec::new(), Vec::new(), Vec::new());
    let settings = machine.settings.patient(4);
    let started = Instant::now();
    for round in 0..settings.rounds {
        if round >= settings.rounds_min && started.elapsed() > settings.patience {
            break;
        }
        for turn in 0..2 {
            let is_elastic = (round + turn) % 2 == 0;
            let cache = match is_elastic {
                true => elastic(&machine.device, stream)?,
                false => Cache::backed(&Blocks::new(blocks), plain.address(), page_bytes),
            };
            let mut decode = Decode::new(cache, stream, &traffic, page_bytes)?;
            for _ in 0..STEPS {
                let step = decode.step()?;
                match is_elastic {
                    true => {
                        own.push(step.own_time);
                        with.push(step.whole_time);
                    }
                    false => without.push(step.whole_time),
                }
            }
        }
    }
    let [own, with, without] = [own, with, without].map(Samples::from_iter);
    let mut outcome = Outcome::default();
    let note = match traffic.bytes_per_second() {
        Some(rate) => format!(
            "{} GiB of memory traffic a step, at {:.0} GB/s",
            STEP_BYTES >> 30,
            rate / 1e9
        ),
        None => "no memory traffic to speak of".to_owned(),
    };
    outcome.add_noted(&OWN, own.quantile_ns(990) / 1e3, None, note);
    outcome.add(&OWN_WORST, own.max_ns() / 1e3, None);
    let (calls, records) = calls_while_stepping(machine)?;
    outcome.add(&CALLS, calls as f64, None);
    outcome.add(&RECORDS, records as f64, None);
    let whole_ms = |samples: &Samples| samples.quantile_ns(990) / 1e6;
    outcome.add(&WHOLE, whole_ms(&with), Some(whole_ms(&without)));
    outcome.measured.push("the pool's own time in a step", own);
    outcome.measured.push("whole steps", with);
    let before = "whole steps, everything allocated before";
    outcome.measured.push(before, without);
    Ok(outcome)
}
