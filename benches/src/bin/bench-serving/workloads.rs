//! Workloads (b), traces, and (c), idle models beside a busy one, a single model that has the whole
//! card, and a busy model that goes idle beside one that needs all the memory that it had.

use crate::contest::{Contest, Pool, SHARED_TOKENS};
use crate::trace;
use anyhow::{Context, Result};
use cuda_vmm_benches::Outcome;
use cuda_vmm_benches::serving::{PHASES, Request, paced};
use std::iter::{once, repeat_n};
use std::path::PathBuf;

/// How many times later each request arrives than in the trace. At the traces' own speed the
/// prompts of the two services alone take 1.2 times the time that one A100 of the time model has.
const STRETCH: u64 = 4;
/// How much of a trace a quick run takes, in nanoseconds of its own time.
const QUICK_NS: u64 = 60_000_000_000;

/// Replays the Azure LLM inference traces, each as a model, if there are any.
pub fn traces(quick: bool, paths: &[PathBuf]) -> Result<Option<Contest>> {
    if paths.is_empty() {
        return Ok(None);
    }
    let mut models = Vec::new();
    for path in paths {
        let mut requests = trace::read(path)?;
        requests.retain(|request| !quick || request.arrival_ns < QUICK_NS);
        // A request for no token still gets the one that the prompt's step makes.
        for request in &mut requests {
            request.arrival_ns *= STRETCH;
            request.prompt_tokens = request.prompt_tokens.max(1);
            request.generated_tokens = request.generated_tokens.max(1);
        }
        models.push(requests);
    }
    let count = models.len();
    let name = format!("(b) {count} traces, {STRETCH} times as slow");
    Contest::hold(&name, SHARED_TOKENS / count, once(models)).map(Some)
}

/// Models that have served a few requests and are idle then.
const IDLE: usize = 7;
/// How long after one idle model the next has its requests.
const APART_NS: u64 = 3_000_000_000;
/// Requests a second, in each second of an idle model.
const IDLE_RATES: [u32; 3] = [4, 4, 4];
/// Requests a second of the busy model, somewhat less than the card computes.
const BUSY_RATE: u32 = 9;

/// Simulates a busy model after idle ones.
pub fn idle(quick: bool) -> Result<Contest> {
    let (phases, seconds) = if quick { (1, 10) } else { (PHASES, 60) };
    let variants = (0..phases).map(|phase| {
        let idle = (0..IDLE as u64).map(|model| paced(model * APART_NS, phase, IDLE_RATES));
        let rates = repeat_n(BUSY_RATE, seconds);
        idle.chain(once(paced(IDLE as u64 * APART_NS, phase, rates)))
            .collect()
    });
    let name = format!("(c) {IDLE} idle models and a busy one");
    Contest::hold(&name, SHARED_TOKENS / (IDLE + 1), variants)
}

/// Requests a second, more than the card computes.
const SINGLE_RATE: u32 = 10;
/// Tokens of each prompt, so long that the memory is full before the steps are.
const SINGLE_PROMPT_TOKENS: u32 = 1024;

/// Simulates one model with too many requests. The static split is all that the other pools have.
pub fn single(quick: bool) -> Result<Contest> {
    let (phases, seconds) = if quick { (1, 10) } else { (PHASES / 4, 60) };
    let long = |request| Request {
        prompt_tokens: SINGLE_PROMPT_TOKENS,
        ..request
    };
    let variants = (0..phases).map(|phase| {
        let requests = paced(0, phase, repeat_n(SINGLE_RATE, seconds));
        vec![requests.into_iter().map(long).collect()]
    });
    Contest::hold("single model, whole card", SHARED_TOKENS, variants)
}

/// Blocks of one request as it grows.
const REQUEST_BLOCKS: usize = 16;
/// Time between two of them, in nanoseconds.
const STEP_NS: u64 = 50_000_000;
/// One block in this many stays live.
const LIVE_EVERY: usize = 1000;

/// The nanoseconds until a model has all that another, which filled the pool, frees of it.
fn hand_back(pool: Pool) -> Result<f64> {
    let mut memory = pool.memory(2, SHARED_TOKENS)?;
    let (busy, needy) = (0, 1);
    let mut now_ns = 0;
    let mut blocks = Vec::new();
    memory.work(now_ns)?;
    while let count @ 1.. = memory.free_blocks(busy).min(REQUEST_BLOCKS)
        && let Some(taken) = memory.take(&mut now_ns, busy, count)?
    {
        blocks.extend(taken);
        memory.idle(&mut now_ns, STEP_NS)?;
    }
    // All work is over, and its last fence past; what follows is what handing over takes.
    let idle_ns = now_ns;
    let freed = blocks.into_iter().enumerate();
    let freed = freed.filter(|(at, _)| !at.is_multiple_of(LIVE_EVERY));
    let blocks: Vec<_> = freed.map(|(_, block)| block).collect();
    let wanted = blocks.len();
    memory.give(&mut now_ns, busy, blocks)?;
    memory.work(now_ns)?;
    memory.go_idle(now_ns, busy)?;
    for taken in (0..wanted).step_by(REQUEST_BLOCKS) {
        let count = (wanted - taken).min(REQUEST_BLOCKS);
        let blocks = memory.take(&mut now_ns, needy, count)?;
        blocks.with_context(|| format!("only {taken} of {wanted} blocks came back"))?;
    }
    Ok((now_ns - idle_ns) as f64)
}

/// Tells how long it takes in both elastic pools.
pub fn tell_hand_back(outcome: &mut Outcome) -> Result<()> {
    for pool in [Pool::Ours, Pool::PageAtATime] {
        let side = format!("hand back: {}", pool.name());
        outcome.count(&side, hand_back(pool)?);
    }
    Ok(())
}
