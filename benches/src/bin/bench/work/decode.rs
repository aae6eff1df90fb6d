//! 128 sequences of one model that grow, each by a token in a step.

use super::gpu::Gpu;
use crate::bare::Plain;
use crate::machine::Machine;
use crate::traffic::Traffic;
use anyhow::Result;
use cuda_vmm::sys::DriverFunction::{self, cuCtxRecordEvent, cuEventRecord};
use cuda_vmm_benches::serving::{BLOCK_BYTES, BLOCK_TOKENS, Limits, Request, Served, Server};
use cuda_vmm_benches::{MEMORY_MANAGEMENT, Outcome, count_of, noted_calls, watch};

const SEQUENCES: usize = 128;
/// Tokens after which a sequence ends and another begins in its place.
const TOKENS: u32 = 256;
/// Memory traffic of a step: the weights of an 8B model, read once.
const STEP_BYTES: usize = 16 << 30;
/// What is made ahead: pages of some steps.
const AHEAD_BYTES: usize = 64 * BLOCK_BYTES;
/// What the blocks of all sequences together have at most.
const BYTES: usize = SEQUENCES * TOKENS.div_ceil(BLOCK_TOKENS) as usize * BLOCK_BYTES;
const RECORDS: [DriverFunction; 2] = [cuEventRecord, cuCtxRecordEvent];
const LIMITS: Limits = Limits {
    sequences_max: SEQUENCES,
    prompt_tokens_max: u32::MAX,
    watermark_divisor: usize::MAX,
};

/// Sequences of many ages, so that each step has as many new blocks, and those that take their
/// places. The first 256 steps take memory that nothing had, another 256 what was freed.
fn requests() -> Vec<Request> {
    let ages = || (0..SEQUENCES as u32).map(|index| index * BLOCK_TOKENS / SEQUENCES as u32);
    let first = ages().map(|age| Request::new(0, 1 + age, TOKENS - age));
    let second = ages().map(|_| Request::new(0, 1, TOKENS));
    // The oldest ends first, and so leaves the most steps.
    let third = ages().rev().filter(|age| *age > 0);
    let third = third.map(|age| Request::new(0, 1, age));
    first.chain(second).chain(third).collect()
}

/// What came of the steps, how many VMM calls they made in all, and the most event records in one.
type Ran = (Served, usize, usize);

/// Takes all steps, with memory made ahead, or with everything allocated before. Freed memory stays
/// mapped, as the model is alone. Calls of the first step, in which all begin, do not count.
fn run(traffic: &Traffic, plain: Option<&Plain>) -> Result<Ran> {
    let (pool, mut gpu) = match plain {
        Some(plain) => (None, Gpu::backed(traffic, 1, (plain, BYTES))),
        None => {
            let limit_bytes = BYTES + AHEAD_BYTES;
            let bytes = [limit_bytes, limit_bytes, AHEAD_BYTES];
            let (pool, gpu) = Gpu::elastic(traffic, 1, bytes)?;
            (Some(pool), gpu)
        }
    };
    let (models, mut served) = ([requests()], Served::default());
    let step_ns = (STEP_BYTES as f64 / traffic.bytes_per_second * 1e9) as u64;
    let step_ns = |_, _| step_ns;
    let mut server = Server::new(&models, &mut gpu, LIMITS, &step_ns, &mut served);
    server.step()?;
    if let Some(pool) = pool {
        // It makes more only when half of it is gone, and may make a chunk more than is asked for.
        watch(pool.engine(), "memory to be made ahead", |stats| {
            stats.parts.filling_bytes == 0 && stats.parts.ahead_bytes > AHEAD_BYTES / 2
        })?;
    }
    let (mut management, mut records) = (0, 0);
    loop {
        let (stepped, calls) = noted_calls(|| server.step());
        if !stepped? {
            return Ok((served, management, records));
        }
        management += count_of(&calls, &MEMORY_MANAGEMENT);
        records = records.max(count_of(&calls, &RECORDS));
    }
}

/// Against the same steps with everything allocated before.
pub fn measure(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let traffic = Traffic::new(machine, &machine.stream)?;
    let plain = Plain::new(&machine.device, BYTES)?;
    let (mut own, mut steps) = (Vec::new(), [Vec::new(), Vec::new()]);
    let settings = machine.settings.patient(4);
    for (_, side) in settings.turns(2, settings.rounds, 0) {
        let plain = [None, Some(&plain)][side];
        let (served, ..) = run(&traffic, plain)?;
        steps[side].extend(served.steps.into_iter().skip(1));
        if plain.is_none() {
            own.extend(served.calls.into_iter().skip(1));
        }
    }
    let [with, without] = steps;
    let (gib, rate) = (STEP_BYTES >> 30, traffic.bytes_per_second / 1e9);
    let mut note = format!("{gib} GiB of memory traffic a step, at {rate:.0} GB/s");
    if rate.is_infinite() {
        note = "no memory traffic to speak of".to_owned();
    }
    outcome.note("the pool's own time in a step", note);
    outcome.times("the pool's own time in a step", own);
    outcome.times("whole steps", with);
    outcome.times("whole steps, everything allocated before", without);

    let traffic = Traffic::new(machine, &machine.noted)?;
    let (_, management, records) = run(&traffic, None)?;
    outcome.count("VMM calls", management as f64);
    outcome.count("event records", records as f64);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_has_all_sequences() {
        let requests = requests();
        let tokens = requests.iter().map(|request| request.generated_tokens);
        assert_eq!(tokens.sum::<u32>(), 2 * TOKENS * SEQUENCES as u32);
        let most = requests.iter().map(Request::tokens_max).max();
        assert_eq!(most, Some(TOKENS));
    }
}
