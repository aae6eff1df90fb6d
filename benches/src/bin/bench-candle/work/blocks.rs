//! A paged cache that was busy and is idle, with a prefix cache that is still warm.

use crate::machine::{DTYPE, HEAD_DIM, KV_HEADS, Machine};
use anyhow::{Result, ensure};
use cuda_vmm::pool::blocks::*;
use cuda_vmm::{Engine, EngineOptions, Stream};
use cuda_vmm_benches::{Outcome, step_until};
use itertools::Itertools;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const LAYERS: [usize; 2] = [32, 1];
const SEQUENCES: [usize; 2] = [64, 48];
/// Blocks of the shortest sequence. The longest are three times as long.
const BLOCKS: usize = 64;
const BLOCK_TOKENS: usize = 16;
/// Blocks of a prefix that all sequences share, which graphs refer to and so is pinned.
const PINNED: usize = 100;
/// Of this many sequences one goes on when the others end.
const ONE_OF: usize = 8;

/// Bytes over time as text: about 40 points, and the last.
fn text(curve: &[(Duration, usize)]) -> String {
    let points = curve.iter().step_by(curve.len().div_ceil(40).max(1));
    let text = |time: &Duration, bytes| format!("{:.3} s {bytes} MiB", time.as_secs_f64());
    let points = points.chain(curve.last()).dedup();
    let mut points = points.map(|(time, bytes)| text(time, bytes >> 20));
    points.join(", ")
}

fn backing(machine: &Machine, blocks: usize) -> Result<BlockBacking> {
    let engine = Engine::new(&machine.device, EngineOptions::new())?;
    let element = ElementSize::new(DTYPE.size_in_bytes())?;
    let shape = [BLOCK_TOKENS, KV_HEADS, HEAD_DIM];
    let tensor = |(layer, part)| TensorSpec::new(format!("{layer}.{part}"), &shape, element);
    let tensors = (0..machine.sized(LAYERS)).cartesian_product(["k", "v"]);
    let page_bytes = machine.device.granularity_bytes();
    let spec = LayerSpec::new(tensors.map(tensor).collect::<Result<Vec<_>, _>>()?)?;
    Ok(BlockBacking::new(&engine, spec, blocks, page_bytes)?)
}

/// Against what is in use.
pub fn measure(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let sequence_count = machine.sized(SEQUENCES);
    let blocks = (PINNED + 3 * BLOCKS * sequence_count).next_power_of_two();
    let backing = backing(machine, blocks)?;
    let stream = Stream::new(&machine.device)?;
    backing.use_stream(&stream)?;
    let allocator = BlockAllocator::new(backing.clone());
    let started = Instant::now();
    let mut curve = Vec::new();
    let mut look = || curve.push((started.elapsed(), backing.stats().committed_bytes));

    let prefix = allocator.allocate(PINNED)?;
    let pin = backing.pin(prefix.iter().copied())?;
    // Sequences of many lengths that grow side by side, so that their blocks are mixed.
    let mut random = StdRng::seed_from_u64(7);
    let mut length = || random.random_range(BLOCKS..=3 * BLOCKS);
    let lengths: Vec<_> = (0..sequence_count).map(|_| length()).collect();
    let mut sequences: Vec<Vec<BlockId>> = vec![Vec::new(); sequence_count];
    for step in 0..3 * BLOCKS {
        let growing = sequences.iter_mut().zip(&lengths);
        for (sequence, _) in growing.filter(|(_, length)| step < **length) {
            sequence.extend(allocator.allocate(1)?);
        }
        look();
    }

    // Most end. The prefix cache keeps their blocks; the longest unused are worth the least.
    let (mut cached, mut live) = (Vec::new(), Vec::new());
    for (index, sequence) in sequences.into_iter().enumerate() {
        match index % ONE_OF {
            0 => live.extend(sequence),
            _ => cached.extend(sequence),
        }
        look();
    }
    let used_bytes = (live.len() + PINNED) * backing.stats().block_bytes;
    let warm_bytes = backing.stats().committed_bytes;

    // Idle: all that is not in use may go.
    let worth: BTreeMap<BlockId, f64> = cached.iter().copied().zip((1..).map(f64::from)).collect();
    let worth = |block| worth.get(&block).copied();
    let plan_started = Instant::now();
    // Moving a block costs less than losing any.
    let plan = allocator.reclaim_candidates_with_moves(usize::MAX, 0.5, worth);
    let planned = plan_started.elapsed();
    allocator.commit(&plan, &stream)?;
    let moves: BTreeMap<_, _> = plan.moves().iter().copied().collect();
    let moved = |block| moves.get(&block).copied().unwrap_or(block);
    let live: Vec<_> = live.into_iter().map(moved).collect();
    stream.synchronize()?;
    let engine = backing.engine();
    step_until(engine, "memory to go back", |stats| {
        look();
        Ok(stats.parts.retiring_bytes == 0)
    })?;
    engine.trim()?;
    look();
    let mut in_use = live.iter().copied().chain(pin.blocks());
    let has_memory = in_use.all(|block| backing.is_backed(block));
    ensure!(has_memory, "a block in use has no memory");
    let left_bytes = backing.stats().committed_bytes;
    let (live, cached, curve) = (live.len(), cached.len(), text(&curve));
    let (evicted, moved) = (plan.evicted().len(), plan.moves().len());
    let planned_ms = planned.as_secs_f64() * 1e3;
    let note = format!(
        "{live} blocks live, {PINNED} pinned, {cached} in the prefix cache before; \
         planned in {planned_ms:.1} ms; {evicted} evicted, {moved} moved; committed: {curve}"
    );
    outcome.count("live and pinned", used_bytes as f64);
    outcome.count("committed before reclaiming", warm_bytes as f64);
    outcome.count("committed after reclaiming", left_bytes as f64);
    outcome.note("committed after reclaiming", note);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_of_many_points_is_told_by_some_and_the_last() {
        let point = |index: usize| (Duration::from_millis(index as u64), index << 20);
        let points = |count| text(&(0..count).map(point).collect::<Vec<_>>());
        let told = points(100);
        assert!(told.starts_with("0.000 s 0 MiB, 0.003 s 3 MiB, "), "{told}");
        assert!(told.ends_with(", 0.099 s 99 MiB"), "{told}");
        assert_eq!(told.split(", ").count(), 34);
        assert_eq!(points(101).split(", ").count(), 35);
        assert_eq!(points(0), "");
    }
}
