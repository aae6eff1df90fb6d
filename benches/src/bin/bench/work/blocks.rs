//! 128 sequences in three models over block tables, each of which gets a token in a step.

use crate::machine::Machine;
use crate::traffic::Traffic;
use anyhow::Result;
use cuda_vmm::pool::blocks::*;
use cuda_vmm::{Engine, EngineOptions};
use cuda_vmm_benches::{MEMORY_MANAGEMENT, Outcome, count_of, noted_calls, step_until};
use std::time::{Duration, Instant};

const MODELS: usize = 3;
const SEQUENCES: usize = 128;
/// 16 tokens of 8 heads of 128 elements of 2 bytes.
const BLOCK_SHAPE: [usize; 3] = [16, 8, 128];
/// Two pages of 2 MiB in each tensor: what a model's sequences take in 48 steps.
const AHEAD_BLOCKS: usize = 128;
const STEPS: usize = 512;
/// How long the memory traffic of a step takes.
const STEP: Duration = Duration::from_millis(4);

/// Takes a token for each sequence: its blocks and its age. Some end and begin again.
fn take(allocator: &BlockAllocator, sequences: &mut [(Vec<BlockId>, usize)]) -> Result<()> {
    for (index, (blocks, age)) in sequences.iter_mut().enumerate() {
        *age += 1;
        if *age > 64 + index * 37 % 448 {
            allocator.free(blocks.drain(..))?;
            *age = 1;
        }
    }
    let mut needy: Vec<_> = sequences.iter_mut().collect();
    needy.retain(|(_, age)| age % BLOCK_SHAPE[0] == 1);
    let taken = allocator.allocate(needy.len())?;
    (needy.into_iter().zip(taken)).for_each(|((blocks, _), block)| blocks.push(block));
    Ok(())
}

/// Takes all steps and notes their own times; returns how many VMM calls they made. At times a
/// model gives back what it does not use, so that its blocks have holes.
fn run(traffic: &Traffic, tensors: usize, own: &mut Vec<f64>) -> Result<usize> {
    let stream = &traffic.stream;
    let (element, page_bytes) = (ElementSize::new(2)?, stream.device().granularity_bytes());
    let engine = Engine::new(stream.device(), EngineOptions::new())?;
    let tensor = |at: usize| TensorSpec::new(at.to_string(), &BLOCK_SHAPE, element);
    let spec = LayerSpec::new((0..tensors).map(tensor).collect::<Result<Vec<_>, _>>()?)?;
    let mut models = Vec::new();
    for model in 0..MODELS {
        let ahead = BlockOptions::new().ahead_blocks_max(AHEAD_BLOCKS);
        let (account, spec) = (engine.own_account()?, spec.clone());
        let backing = BlockBacking::with_options(&account, spec, 1 << 13, page_bytes, ahead)?;
        backing.use_stream(stream)?;
        let ages = (model..SEQUENCES).step_by(MODELS);
        let sequences: Vec<_> = ages.map(|age| (Vec::new(), age % 16)).collect();
        models.push((BlockAllocator::new(backing), sequences));
    }
    let ahead_bytes = MODELS * AHEAD_BLOCKS * models[0].0.backing().stats().block_bytes;
    let is_ahead = |stats: &cuda_vmm::EngineStats| Ok(stats.parts.ahead_bytes >= ahead_bytes);
    step_until(&engine, "memory to be made ahead", is_ahead)?;
    let mut calls = 0;
    for (step, at) in (0..STEPS).flat_map(|step| (0..MODELS).map(move |at| (step, at))) {
        let (allocator, sequences) = &mut models[at];
        let is_giving = step % 128 == 100 + at;
        let plan = is_giving.then(|| allocator.reclaim_candidates(usize::MAX, |_| None));
        let started = Instant::now();
        let (taken, noted) = noted_calls(|| {
            plan.map_or(Ok(()), |plan| allocator.commit(&plan, stream))?;
            take(allocator, sequences)
        });
        own.push(started.elapsed().as_nanos() as f64);
        taken?;
        calls += count_of(&noted, &MEMORY_MANAGEMENT);
        traffic.queue_for(STEP)?;
        stream.synchronize()?;
    }
    Ok(calls)
}

/// With keys and values of 32 layers.
pub fn measure(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let tensors = if machine.is_real() { 64 } else { 4 };
    let (traffic, mut own) = (Traffic::new(machine, &machine.stream)?, Vec::new());
    for _ in machine.settings.turns(1, machine.settings.rounds, 0) {
        run(&traffic, tensors, &mut own)?;
    }
    outcome.times("the pool's own time in a step", own);
    let traffic = Traffic::new(machine, &machine.noted)?;
    let noted = run(&traffic, tensors, &mut Vec::new())?;
    outcome.count("VMM calls", noted as f64);
    Ok(())
}
