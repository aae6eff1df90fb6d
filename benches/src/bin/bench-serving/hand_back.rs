//! A busy model goes idle beside one that needs all the memory that it had.

use crate::contest::{Sizes, told};
use crate::pools::elastic::Elastic;
use anyhow::{Context, Result};
use cuda_vmm_benches::figure::{Finding, Reach};
use cuda_vmm_benches::serving::Memory;

/// Blocks of one request as it grows.
const REQUEST_BLOCKS: usize = 16;
/// Time between two of them, in nanoseconds.
const STEP_NS: u64 = 50_000_000;
/// Within which the memory must be the other's, in milliseconds.
const REACH_MS: f64 = 100.0;
/// One block in this many stays live.
const LIVE_EVERY: usize = 1000;

/// When one model has filled the pool and frees all except a few blocks here and there, how long it
/// takes until the other has all that is free.
fn hand_back<M: Memory>(
    mut memory: M,
    go_idle: impl FnOnce(&mut M, usize, u64) -> Result<()>,
) -> Result<f64> {
    let (busy, needy) = (0, 1);
    let mut now_ns = 0;
    let mut blocks = Vec::new();
    memory.work(now_ns)?;
    loop {
        let count = memory.free_blocks(busy).min(REQUEST_BLOCKS);
        if count == 0 {
            break;
        }
        let Some(taken) = memory.take(&mut now_ns, busy, count)? else {
            break;
        };
        blocks.extend(taken);
        memory.work(now_ns)?;
        now_ns += STEP_NS;
    }
    // All work is over, and its last fence past; what follows is what handing over takes.
    let idle_ns = now_ns;
    let mut at = 0..;
    blocks.retain(|_| {
        at.next()
            .is_some_and(|at: usize| !at.is_multiple_of(LIVE_EVERY))
    });
    let wanted = blocks.len();
    memory.give(&mut now_ns, busy, blocks)?;
    memory.work(now_ns)?;
    go_idle(&mut memory, busy, now_ns)?;
    for taken in (0..wanted).step_by(REQUEST_BLOCKS) {
        let count = (wanted - taken).min(REQUEST_BLOCKS);
        let blocks = memory.take(&mut now_ns, needy, count)?;
        blocks.with_context(|| format!("only {taken} of {wanted} blocks came back"))?;
    }
    Ok((now_ns - idle_ns) as f64 / 1e6)
}

/// Measures both elastic pools, and judges ours.
pub fn judge(quick: bool) -> Result<Finding> {
    let sizes = Sizes::PUBLISHED;
    let ours_ms = hand_back(sizes.elastic(2)?, Elastic::go_idle)?;
    let peer_ms = hand_back(sizes.page_at_a_time(2)?, |_, _, _| Ok(()))?;
    let name = "a busy model goes idle: until the other has all that is not live: page at a time";
    let finding = Finding::new(name, "ms", Reach::AtMost(REACH_MS));
    Ok(told(quick, finding.judge(ours_ms, Some(peer_ms))))
}
