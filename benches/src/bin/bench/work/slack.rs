//! What is held without being live.

use super::{Outcome, Work};
use crate::demand::{Demand, Reach};
use crate::machine::{self, Machine};
use anyhow::Result;
use cuda_vmm::VirtualMemoryPool;

const GROWN: Demand = Demand::count(
    "slack at the worst moment of growth without frees: 12.5% of live and one page",
    "bytes",
    Reach::AtMostTimes(1.0),
);
const COMPACTED: Demand = Demand::count(
    "slack after compact() of a range with holes: 12.5% of live and one page",
    "bytes",
    Reach::AtMostTimes(1.0),
);

/// Against what is allowed.
pub const WORK: Work = Work {
    name: "slack",
    demands: &[GROWN, COMPACTED],
    measure,
};

/// How far the range grows.
const BYTES: usize = 2 << 30;

/// The slack of a range and what is allowed for it, in bytes.
fn slack(pool: &VirtualMemoryPool) -> (f64, f64) {
    let stats = pool.stats();
    let allowed_bytes = stats.parts.live_page_bytes as f64 / 8.0 + stats.page_bytes as f64;
    (stats.parts.slack_bytes as f64, allowed_bytes)
}

fn measure(machine: &Machine) -> Result<Outcome> {
    let page_bytes = machine.page_bytes;
    let mut pool = machine.pool(machine::options(), BYTES)?;
    let mut worst = (0.0, page_bytes as f64);
    // Steps that end within pages.
    let step_bytes = page_bytes * 3 / 4;
    let mut end = 0;
    while end + step_bytes <= BYTES {
        pool.allocate(end, step_bytes)?;
        end += step_bytes;
        let now = slack(&pool);
        if now.0 / now.1 > worst.0 / worst.1 {
            worst = now;
        }
    }
    let mut outcome = Outcome::default();
    outcome.add(&GROWN, worst.0, Some(worst.1));
    // Of every eight pages one stays, so that most of each chunk is slack.
    for hole in (0..end / page_bytes - 8).step_by(8) {
        pool.deallocate((hole + 1) * page_bytes, 7 * page_bytes)?;
    }
    machine.stream.synchronize()?;
    pool.compact()?;
    let (slack_bytes, allowed_bytes) = slack(&pool);
    outcome.add(&COMPACTED, slack_bytes, Some(allowed_bytes));
    Ok(outcome)
}
