//! One workload in four pools.

use crate::pools::elastic::Elastic;
use crate::pools::page_at_a_time::PageAtATime;
use crate::time_model::TimeModel;
use anyhow::{Context, Result};
use cuda_vmm_benches::{Outcome, mean, quantile, serving::*};
use cuda_vmm_sim::CostModel;

/// The pools, in the order of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// A part of the card for each model.
    StaticSplit,
    /// Pages of 2 MiB with a handle each.
    PageAtATime,
    Ours,
    /// Calls cost nothing.
    Ideal,
}

/// Tokens of KV that the models share, as published. A static split may give them less.
pub const SHARED_TOKENS: usize = 213_000;
/// Divisor of our pool's budget: for what is parked at most, and for what all models have ahead.
const SHARE: usize = 16;
/// Our whole pool changes hands within 0.1 s, and yet a chunk seldom stays for one block.
const CHUNK_BYTES_MAX: usize = 32 << 20;

impl Pool {
    pub const ALL: [Self; 4] = [
        Self::StaticSplit,
        Self::PageAtATime,
        Self::Ours,
        Self::Ideal,
    ];

    pub fn name(self) -> &'static str {
        ["static split", "page at a time", "ours", "ideal"][self as usize]
    }

    /// A pool on a card of its own. In a static split each model has `static_tokens`.
    pub fn memory(self, models: usize, static_tokens: usize) -> Result<Box<dyn Memory>> {
        let (blocks, costs) = (blocks_within(SHARED_TOKENS), Some(CostModel::h100()));
        // Memory that is parked or made ahead disturbs no other model if there is only one.
        let share_bytes = SHARED_TOKENS * TOKEN_BYTES / if models == 1 { 1 } else { SHARE };
        let settings = (share_bytes, CHUNK_BYTES_MAX);
        Ok(match self {
            Self::StaticSplit => Box::new(Counted::split(blocks_within(static_tokens), models)),
            Self::PageAtATime => Box::new(PageAtATime::new(blocks, models, costs)?),
            Self::Ours => Box::new(Elastic::new(blocks, models, costs, settings)?),
            Self::Ideal => Box::new(Counted::shared(blocks, models)),
        })
    }
}

/// What came of a workload in each pool.
pub struct Contest {
    pub name: String,
    outcomes: Vec<Served>,
}

impl Contest {
    /// Runs all variants of a workload in each pool, and takes those of one pool together.
    pub fn hold(
        name: &str,
        static_tokens: usize,
        variants: impl Iterator<Item = Vec<Vec<Request>>> + Clone,
    ) -> Result<Self> {
        let time = |prompt, decodes| TimeModel::FITTED.step(prompt, decodes);
        let serve = |pool: Pool| {
            let mut served = Served::default();
            for models in variants.clone() {
                let mut memory = pool.memory(models.len(), static_tokens)?;
                let limits = Limits::DEFAULT;
                let server = Server::new(&models, &mut *memory, limits, &time, &mut served);
                server.run(u64::MAX)?;
            }
            Ok(served)
        };
        let outcomes: Result<_> = Pool::ALL.into_iter().map(serve).collect();
        let (outcomes, name) = (outcomes.with_context(|| name.to_owned())?, name.to_owned());
        Ok(Self { name, outcomes })
    }

    pub fn of(&self, pool: Pool) -> &Served {
        &self.outcomes[pool as usize]
    }

    pub fn p99_ms(&self, pool: Pool) -> f64 {
        quantile(&self.of(pool).first_token, 990) / 1e6
    }

    /// Tells what its figures come of, in nanoseconds.
    pub fn tell(&self, outcome: &mut Outcome) {
        for pool in Pool::ALL {
            let (served, pool_name) = (self.of(pool), pool.name());
            let mut tell = |figure: &str, ns| {
                outcome.count(&format!("{}: {figure}: {pool_name}", self.name), ns);
            };
            tell("mean time to first token", mean(&served.first_token));
            let p99 = quantile(&served.first_token, 990);
            tell("p99 time to first token", p99);
            tell("mean time per token", mean(&served.per_token));
            tell("tokens a second", 1e9 / served.tokens_per_second());
        }
    }
}
