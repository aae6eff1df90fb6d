//! A busy model goes idle beside one that needs all the memory that it had.

use crate::contest::{Pool, SHARED_TOKENS};
use anyhow::{Context, Result};
use cuda_vmm_benches::figure::Finding;

/// Blocks of one request as it grows.
const REQUEST_BLOCKS: usize = 16;
/// Time between two of them, in nanoseconds.
const STEP_NS: u64 = 50_000_000;
/// One block in this many stays live.
const LIVE_EVERY: usize = 1000;

/// When one model has filled the pool and frees all except a few blocks here and there, how long it
/// takes until the other has all that is free, in milliseconds.
fn hand_back(pool: Pool) -> Result<f64> {
    let mut memory = pool.memory(2, SHARED_TOKENS)?;
    let (busy, needy) = (0, 1);
    let mut now_ns = 0;
    let mut blocks = Vec::new();
    memory.work(now_ns)?;
    loop {
        let count = memory.free_blocks(busy).min(REQUEST_BLOCKS);
        let taken = match count {
            0 => None,
            _ => memory.take(&mut now_ns, busy, count)?,
        };
        let Some(taken) = taken else {
            break;
        };
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
    Ok((now_ns - idle_ns) as f64 / 1e6)
}

/// Measures both elastic pools, and judges ours.
pub fn judge() -> Result<Finding> {
    let (ours_ms, peer_ms) = (hand_back(Pool::Ours)?, hand_back(Pool::PageAtATime)?);
    let name = "a busy model goes idle: until the other has all that is not live: page at a time";
    Ok(Finding::new(name, "ms", "≤ 100 ms").judge(ours_ms, Some(peer_ms)))
}
