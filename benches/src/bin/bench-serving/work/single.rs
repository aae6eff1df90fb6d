//! A single model that has the whole card, and more requests than it can serve at once.

use super::{Course, demand};
use crate::arrivals::{PHASES, paced};
use crate::contest::{Contest, Pool, Sizes};
use crate::demand::{Finding, Reach};
use crate::work::ramps::SIZES;
use crate::workload::Workload;
use anyhow::Result;

/// Requests a second, more than the card computes.
const RATE: u32 = 10;
/// How long they come.
const SECONDS: usize = 60;
/// Tokens of each prompt, so long that the memory is full before the steps are.
const PROMPT_TOKENS: u32 = 1024;

/// Simulates it. The static split is all that the other pools have.
///
/// # Errors
/// If a pool fails.
pub fn hold(course: &Course) -> Result<Contest> {
    let (phases, seconds) = if course.quick {
        (1, 10)
    } else {
        (PHASES / 4, SECONDS)
    };
    let variants = (0..phases).map(|phase| {
        let mut requests = paced(0, phase, std::iter::repeat_n(RATE, seconds));
        for request in &mut requests {
            request.prompt_tokens = PROMPT_TOKENS;
        }
        Workload {
            models: vec![requests],
        }
    });
    let sizes = Sizes {
        static_tokens: SIZES.shared_tokens,
        ..SIZES
    };
    Contest::hold(
        "single model, whole card",
        &variants.collect::<Vec<_>>(),
        sizes,
    )
}

/// Judges it.
pub fn judge(course: &Course, contest: &Contest) -> Vec<Finding> {
    let throughput = |pool| contest.of(pool).tokens_per_second();
    let against = |pool: Pool, least| {
        let name = format!("{}: tokens a second: {}", contest.name, pool.name());
        let demand = demand(name, "tokens/s", Reach::AtLeastTimes(least));
        course.judge(&demand, throughput(Pool::Ours), Some(throughput(pool)))
    };
    vec![
        against(Pool::StaticSplit, 1.0),
        against(Pool::PageAtATime, 1.0),
    ]
}
