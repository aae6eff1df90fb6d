//! 128 sequences of one model that grow, each by a token in a step.

use super::cache::{Blocks, Cache};
use crate::bare::Plain;
use crate::machine::Machine;
use crate::recorder::{self, Call};
use crate::traffic::Traffic;
use anyhow::{Context, Result};
use cuda_vmm::sys::DriverFunction;
use cuda_vmm::{Device, EngineOptions, Stream};
use cuda_vmm_benches::serving::{BLOCK_BYTES, BLOCK_TOKENS};
use cuda_vmm_benches::{Outcome, SharedSizes, shared_models};
use std::time::{Duration, Instant};

const SEQUENCES: usize = 128;
/// Tokens of a block.
const BLOCK: usize = BLOCK_TOKENS as usize;
/// Tokens after which a sequence ends and another begins in its place.
const TOKENS: usize = 256;
/// The first 256 steps take memory that nothing had, the others what was freed.
const STEPS: usize = 2 * TOKENS;
/// Memory traffic of a step: the weights of an 8B model, read once.
const STEP_BYTES: usize = 16 << 30;
/// What is made ahead: pages of some steps.
const AHEAD_BYTES: usize = 64 * BLOCK_BYTES;
/// Blocks that all sequences together have at most.
const BLOCKS_MAX: usize = SEQUENCES * TOKENS.div_ceil(BLOCK);

/// A model that decodes.
struct Decode<'a> {
    cache: Cache,
    /// For each sequence, how many tokens it has, and its blocks.
    sequences: Vec<(usize, Vec<u32>)>,
    stream: &'a Stream,
    traffic: &'a Traffic<'a>,
}

impl<'a> Decode<'a> {
    /// Sequences that have begun at different times, so that in each step as many need a new block.
    fn new(mut cache: Cache, stream: &'a Stream, traffic: &'a Traffic<'a>) -> Result<Self> {
        let sequences = (0..SEQUENCES).map(|index| {
            let tokens = index % BLOCK;
            Ok((
                tokens,
                cache.take(tokens.min(1))?.context("no room to begin")?,
            ))
        });
        let sequences = sequences.collect::<Result<_>>()?;
        cache.await_ahead(AHEAD_BYTES)?;
        cache.own_time();
        Ok(Self {
            cache,
            sequences,
            stream,
            traffic,
        })
    }

    /// Ends what has all its tokens, and makes one token of each sequence. Returns the pool's own
    /// time and that of the whole step.
    fn step(&mut self) -> Result<(Duration, Duration)> {
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
            if tokens.is_multiple_of(BLOCK) {
                for block in self.cache.take(1)?.context("the pool has no room")? {
                    let target = self.cache.address(block);
                    // SAFETY: the block is live until its sequence ends, which is after this step's
                    // work.
                    unsafe { self.traffic.touch(self.stream, target, BLOCK_BYTES) }?;
                    blocks.push(block);
                }
            }
            *tokens += 1;
        }
        self.traffic.queue(self.stream, STEP_BYTES)?;
        self.stream.synchronize()?;
        Ok((self.cache.own_time(), started.elapsed()))
    }
}

/// A model of a shared pool with memory made ahead; freed memory stays mapped, as the model is
/// alone.
fn elastic(device: &Device, stream: &Stream) -> Result<Cache> {
    let limit_bytes = BLOCKS_MAX * BLOCK_BYTES + AHEAD_BYTES;
    let engine = EngineOptions::new()
        .limit_bytes(limit_bytes)
        .park_bytes_max(limit_bytes)
        .chunk_bytes_max(0);
    let sizes = SharedSizes {
        page_bytes: BLOCK_BYTES,
        capacity_bytes: limit_bytes,
        ahead_bytes: AHEAD_BYTES,
    };
    let (_, mut models) = shared_models(device, engine, sizes, std::slice::from_ref(stream))?;
    Ok(Cache::elastic(models.remove(0)))
}

/// Against the same steps with everything allocated before.
pub fn measure(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let (device, stream) = (&machine.device, &machine.stream);
    let traffic = Traffic::new(machine, device, stream)?;
    let plain = Plain::new(device, BLOCKS_MAX * BLOCK_BYTES)?;
    // Own times and whole steps, with the pool and without.
    let mut times = [(); 2].map(|()| (Vec::new(), Vec::new()));
    let settings = machine.settings.patient(4);
    for (_, side) in settings.turns(2, settings.rounds, 0) {
        let cache = match side {
            0 => elastic(device, stream)?,
            _ => Cache::backed(&Blocks::new(BLOCKS_MAX), plain.address()),
        };
        let mut decode = Decode::new(cache, stream, &traffic)?;
        for _ in 0..STEPS {
            let (own, whole) = decode.step()?;
            times[side].0.push(own);
            times[side].1.push(whole);
        }
    }
    let [(own, with), (_, without)] = times;
    let note = traffic.bytes_per_second().map(|rate| {
        let (gib, rate) = (STEP_BYTES >> 30, rate / 1e9);
        format!("{gib} GiB of memory traffic a step, at {rate:.0} GB/s")
    });
    let note = note.unwrap_or_else(|| "no memory traffic to speak of".to_owned());
    outcome.note("the pool's own time in a step", note);
    outcome.times("the pool's own time in a step", own);
    outcome.times("whole steps", with);
    outcome.times("whole steps, everything allocated before", without);
    count_calls(machine, outcome)
}

/// The steps with their calls noted: how many VMM calls this thread makes in all, and how many
/// event records in a step at most.
fn count_calls(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let is_record = |call: &&Call| {
        let function = call.function;
        [
            DriverFunction::cuEventRecord,
            DriverFunction::cuCtxRecordEvent,
        ]
        .contains(&function)
    };
    let stream = Stream::new(&machine.recorded)?;
    let traffic = Traffic::new(machine, &machine.recorded, &stream)?;
    let mut decode = Decode::new(elastic(&machine.recorded, &stream)?, &stream, &traffic)?;
    let (mut calls, mut records) = (0, 0);
    for _ in 0..STEPS {
        let (stepped, made) = recorder::record(|| decode.step());
        stepped?;
        calls += made
            .iter()
            .filter(|call| call.is_memory_management())
            .count();
        records = records.max(made.iter().filter(is_record).count());
    }
    outcome.count("VMM calls", calls as f64);
    outcome.count("event records", records as f64);
    Ok(())
}
