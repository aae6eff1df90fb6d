//! A busy model goes idle beside one that needs all the memory that it had.

use super::{Course, demand};
use crate::card::Costs;
use crate::demand::{Finding, Reach};
use crate::pools::elastic::{Elastic, Settings};
use crate::pools::page_at_a_time::PageAtATime;
use crate::pools::{Memory, TOKEN_BYTES, blocks_within};
use crate::work::ramps::SIZES;
use anyhow::{Result, ensure};

/// Blocks of one request as it grows.
const REQUEST_BLOCKS: usize = 16;
/// Time between two of them, in nanoseconds.
const STEP_NS: u64 = 50_000_000;
/// Within which the memory must be the other's, in milliseconds.
const REACH_MS: f64 = 100.0;

/// One block in so many stays live.
const LIVE_EVERY: usize = 1000;

/// When one model has filled the pool and frees all but a few blocks here and there, how long it takes until the other has all
/// that is free.
fn hand_back<M: Memory>(
    memory: &mut M,
    go_idle: impl FnOnce(&mut M, usize, u64) -> Result<()>,
) -> Result<f64> {
    let (busy, needy) = (0, 1);
    let mut now_ns = 0;
    let mut blocks = Vec::new();
    memory.work(now_ns)?;
    loop {
        let count = memory.free_blocks(busy).min(REQUEST_BLOCKS);
        if count == 0 || !memory.take(&mut now_ns, busy, count, &mut blocks)? {
            break;
        }
        memory.work(now_ns)?;
        now_ns += STEP_NS;
    }
    let full = blocks.len();
    // All work is over, and its last fence past; what follows is what handing over takes.
    let idle_ns = now_ns;
    let (live, freed): (Vec<_>, Vec<_>) = (0..full)
        .zip(blocks)
        .partition(|(index, _)| index % LIVE_EVERY == 0);
    let mut freed: Vec<_> = freed.into_iter().map(|(_, block)| block).collect();
    memory.give(&mut now_ns, busy, &mut freed)?;
    memory.work(now_ns)?;
    go_idle(memory, busy, now_ns)?;
    let wanted = full - live.len();
    let mut taken = Vec::new();
    while taken.len() < wanted {
        let count = (wanted - taken.len()).min(REQUEST_BLOCKS);
        let has = memory.take(&mut now_ns, needy, count, &mut taken)?;
        ensure!(has, "only {} of {wanted} blocks came back", taken.len());
    }
    Ok((now_ns - idle_ns) as f64 / 1e6)
}

/// Measures both elastic pools, and judges ours.
///
/// # Errors
/// If a pool fails.
pub fn judge(course: &Course) -> Result<Vec<Finding>> {
    let limit_bytes = SIZES.shared_tokens * TOKEN_BYTES;
    let mut ours = Elastic::new(
        limit_bytes,
        2,
        Costs::Measured,
        Settings::of(limit_bytes, 2),
    )?;
    let mut peer = PageAtATime::new(blocks_within(SIZES.shared_tokens), 2, Costs::Measured)?;
    let name = "a busy model goes idle: until the other has all that is not live: page at a time";
    let demand = demand(name.to_owned(), "ms", Reach::AtMost(REACH_MS));
    let ours_ms = hand_back(&mut ours, Elastic::go_idle)?;
    let peer_ms = hand_back(&mut peer, |_, _, _| Ok(()))?;
    Ok(vec![course.judge(&demand, ours_ms, Some(peer_ms))])
}
