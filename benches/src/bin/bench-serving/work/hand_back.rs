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

/// When one model has filled the pool and frees all at once, how long it takes until the other has all of it.
fn hand_back(memory: &mut dyn Memory) -> Result<f64> {
    let (busy, needy) = (0, 1);
    let mut now_ns = 0;
    let mut blocks = Vec::new();
    memory.work(now_ns)?;
    // The last of the pool may be ahead of the needy model, which is its own already.
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
    memory.give(&mut now_ns, busy, &mut blocks)?;
    memory.work(now_ns)?;
    let mut taken = Vec::new();
    while taken.len() < full {
        let count = (full - taken.len()).min(REQUEST_BLOCKS);
        let has = memory.take(&mut now_ns, needy, count, &mut taken)?;
        ensure!(has, "only {} of {full} blocks came back", taken.len());
    }
    Ok((now_ns - idle_ns) as f64 / 1e6)
}

/// Measures both elastic pools, and judges ours.
///
/// # Errors
/// If a pool fails.
pub fn judge(course: &Course) -> Result<Vec<Finding>> {
    let limit_bytes = SIZES.shared_tokens * TOKEN_BYTES;
    let mut ours = Elastic::new(limit_bytes, 2, Costs::Measured, Settings::of(limit_bytes, 2))?;
    let mut peer = PageAtATime::new(blocks_within(SIZES.shared_tokens), 2, Costs::Measured)?;
    let name = "a busy model goes idle: until the other has all of its memory: page at a time";
    let demand = demand(name.to_owned(), "ms", Reach::AtMost(REACH_MS));
    Ok(vec![course.judge(&demand, hand_back(&mut ours)?, Some(hand_back(&mut peer)?))])
}
