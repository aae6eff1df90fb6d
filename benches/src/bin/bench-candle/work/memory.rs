//! The memory behind the caches of all layers.

use super::{Outcome, Work};
use crate::demand::{Demand, Reach};
use crate::layers::{Layers, token_bytes, tokens};
use crate::machine::Machine;
use anyhow::{Result, ensure};
use candle_cuda_vmm::TensorPool;
use std::time::{Duration, Instant};

// Only a GPU can tell: on a CPU these caches are buffers that double.
const SHORT: Demand = Demand::time(
    "memory of 32 layers, 1,000 tokens, without what is ahead: live and 64 pages",
    "bytes",
    Reach::AtMostTimes(1.0),
);
const MIDDLE: Demand = Demand::time(
    "memory of 32 layers, 10,000 tokens, without what is ahead: 1.125 live and 64 pages",
    "bytes",
    Reach::AtMostTimes(1.0),
);
const LONG: Demand = Demand::time(
    "memory of 32 layers, 100,000 tokens, without what is ahead: 1.125 live and 64 pages",
    "bytes",
    Reach::AtMostTimes(1.0),
);

/// Against what is allowed.
pub const WORK: Work = Work {
    name: "memory of the caches",
    demands: &[SHORT, MIDDLE, LONG],
    measure,
};

/// Tokens that are appended at once.
const PART: usize = 1000;
/// What Candle's cache is told to be ready for.
const PREALLOCATED_TOKENS: usize = 131_072;
/// For how long memory may be on its way.
const PATIENCE: Duration = Duration::from_secs(10);

/// What may be held for so many live bytes.
fn allowed_bytes(live_bytes: usize, page_bytes: usize) -> f64 {
    let most = match live_bytes < 1 << 30 {
        true => live_bytes as f64,
        false => live_bytes as f64 * 1.125,
    };
    most + 64.0 * page_bytes as f64
}

/// What is held without, and with, what was made ahead; when nothing is on its way.
fn held(pool: &TensorPool) -> Result<(usize, usize)> {
    let Some(engine) = pool.engine() else {
        return Ok((pool.committed_bytes(), pool.committed_bytes()));
    };
    let started = Instant::now();
    loop {
        let stats = engine.stats();
        if stats.parts.filling_bytes + stats.parts.retiring_bytes == 0 {
            let held = stats.committed_bytes - stats.parts.ahead_bytes;
            return Ok((held, stats.committed_bytes));
        }
        ensure!(started.elapsed() < PATIENCE, "memory stays on its way");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn measure(machine: &Machine) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let token_bytes = token_bytes(machine.sizes.layers);
    let page_bytes = machine.device.granularity_bytes();
    for (demand, count) in WORK.demands.iter().zip(machine.sizes.held) {
        let pool = machine.pool()?;
        let mut layers = Layers::elastic(machine, &pool, count);
        let part = PART.min(count);
        let tokens = tokens(machine, part)?;
        for _ in 0..count / part {
            layers.append(&tokens)?;
        }
        machine.synchronize()?;
        let live_bytes = count * token_bytes;
        let (held_bytes, committed_bytes) = held(&pool)?;
        let note = format!(
            "{count} tokens, {live_bytes} bytes live, {} ahead; KvCache({PREALLOCATED_TOKENS}) takes {} bytes",
            committed_bytes - held_bytes,
            PREALLOCATED_TOKENS * token_bytes
        );
        let allowed = allowed_bytes(live_bytes, page_bytes);
        outcome.add_noted(demand, held_bytes as f64, Some(allowed), note);
    }
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_eighth_more_is_allowed_from_a_gibibyte_on() {
        const PAGE: usize = 2 << 20;
        const GIB: usize = 1 << 30;
        assert_eq!(allowed_bytes(0, PAGE), (64 * PAGE) as f64);
        assert_eq!(allowed_bytes(GIB - 8, PAGE), (GIB - 8 + 64 * PAGE) as f64);
        let more = GIB + GIB / 8 + 64 * PAGE;
        assert_eq!(allowed_bytes(GIB, PAGE), more as f64);
    }
}
