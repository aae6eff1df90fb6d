//! Three models that share a pool, replayed in real time: what the pool's calls add to each step.

use super::gpu::Gpu;
use crate::bare::Plain;
use crate::machine::Machine;
use crate::traffic::Traffic;
use anyhow::Result;
use cuda_vmm_benches::{Outcome, serving::*};

const OWN_TIME: &str = "the pool's own time in a step";
const MODELS: usize = 3;
/// What is made ahead for each model: that of a few prompts.
const AHEAD_BYTES: usize = 64 * BLOCK_BYTES;
/// How much freed memory stays mapped before it goes back for the other models.
const PARK_BYTES: usize = 512 * BLOCK_BYTES;
/// Eight prompts in a step, and nothing kept free for what runs.
const LIMITS: Limits = Limits {
    sequences_max: usize::MAX,
    prompt_tokens_max: 8 * PROMPT_TOKENS,
    watermark_divisor: usize::MAX,
};

/// Against one buffer for all, in which all blocks have memory from the beginning.
pub fn measure(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let (replay, traffic) = (&machine.replay, Traffic::new(machine, &machine.stream)?);
    // All the memory that the pools share, or less on a smaller card.
    let limit_bytes = machine.fitting(replay.tokens * TOKEN_BYTES, 0.9, BLOCK_BYTES)?;
    let (from_s, to_s) = replay.window_s();
    let window_ns = (from_s * 1e9) as u64..(to_s * 1e9) as u64;
    let mut requests = staggered_ramps(MODELS as u32, replay.peak, 0);
    for requests in &mut requests {
        requests.retain(|request| window_ns.contains(&request.arrival_ns));
        (requests.iter_mut()).for_each(|request| request.arrival_ns -= window_ns.start);
    }
    // In the simulator steps take no time, and the trace goes by as fast as other work is measured.
    let speed = match machine.is_real() {
        true => 1.0,
        false => (replay.seconds / machine.settings.patience.as_secs_f64()).max(1.0),
    };
    let step_ns = |prompt, decodes| replay.step_time(decodes, prompt as usize).as_nanos() as u64;
    let serve = |gpu: &mut Gpu| {
        gpu.speed = speed;
        let mut served = Served::default();
        let server = Server::new(&requests, gpu, LIMITS, &step_ns, &mut served);
        server.run((replay.seconds * 1e9) as u64)?;
        anyhow::Ok(served)
    };

    let bytes = [limit_bytes, PARK_BYTES, AHEAD_BYTES];
    let (pool, mut gpu) = Gpu::elastic(&traffic, MODELS, bytes)?;
    gpu.watched = Some((pool.clone(), 0, 0));
    let ours = serve(&mut gpu)?;
    let late = pool.snapshot().counters.ranges.late_prefetches;
    let most_bytes = gpu.watched.take().map_or(0, |(.., most_bytes)| most_bytes);
    drop(gpu);
    outcome.count("late allocations", late as f64);
    outcome.count("most bytes committed", most_bytes as f64);
    outcome.count("limit", limit_bytes as f64);
    for name in pool.models() {
        pool.unregister_model(&name)?;
    }
    drop(pool);

    let plain = (&Plain::new(&machine.device, limit_bytes)?, limit_bytes);
    let before = serve(&mut Gpu::backed(&traffic, MODELS, plain))?;
    let (peak, step_ms, sequence_ms) = (replay.peak, replay.step_ms, replay.sequence_ms);
    let (token_ms, ended, most) = (replay.prompt_token_ms, ours.served, ours.sequences_max);
    let note = format!(
        "peak {peak} requests/s, seconds {from_s} to {to_s} of the trace, steps of {step_ms} ms \
         and {sequence_ms} ms a sequence, {token_ms} ms a prompt's token; {ended} requests ended, \
         at most {most} sequences in a step"
    );
    outcome.note(OWN_TIME, note);
    for (served, whose) in [(ours, ""), (before, ", everything allocated before")] {
        let (refused, preemptions) = (served.refused_prompts as f64, served.preemptions as f64);
        outcome.times(&format!("{OWN_TIME}{whose}"), served.calls);
        outcome.times(&format!("whole steps{whose}"), served.steps);
        outcome.count(&format!("refused prompts{whose}"), refused);
        outcome.count(&format!("preemptions{whose}"), preemptions);
    }
    Ok(())
}
