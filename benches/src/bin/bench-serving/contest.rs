//! One workload in four pools.

use crate::pools::counted::Counted;
use crate::pools::elastic::Elastic;
use crate::pools::page_at_a_time::PageAtATime;
use crate::time_model::TimeModel;
use anyhow::{Context, Result};
use cuda_vmm_benches::figure::Finding;
use cuda_vmm_benches::serving::{
    Limits, Memory, Request, Served, Server, TOKEN_BYTES, blocks_within,
};
use cuda_vmm_sim::CostModel;

/// The pools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// A part of the card for each model.
    StaticSplit,
    /// Pages of 2 MiB with a handle each.
    PageAtATime,
    /// Ours.
    Ours,
    /// Calls cost nothing.
    Ideal,
}

impl Pool {
    /// All of them, in the order of the tables.
    pub const ALL: [Self; 4] = [
        Self::StaticSplit,
        Self::PageAtATime,
        Self::Ours,
        Self::Ideal,
    ];

    /// As reports name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::StaticSplit => "static split",
            Self::PageAtATime => "page at a time",
            Self::Ours => "ours",
            Self::Ideal => "ideal",
        }
    }

    /// A pool of these sizes for this many models, on a card of its own.
    pub fn memory(self, sizes: Sizes, models: usize) -> Result<Box<dyn Memory>> {
        let (blocks, costs) = (blocks_within(sizes.shared_tokens), Some(CostModel::h100()));
        // Memory that is parked or made ahead disturbs no other model if there is only one.
        let share_bytes = sizes.shared_tokens * TOKEN_BYTES / if models == 1 { 1 } else { SHARE };
        let settings = (share_bytes, CHUNK_BYTES_MAX);
        Ok(match self {
            Self::StaticSplit => Box::new(Counted::split(sizes.static_tokens, models)),
            Self::PageAtATime => Box::new(PageAtATime::new(blocks, models, costs)?),
            Self::Ours => Box::new(Elastic::new(blocks, models, costs, settings)?),
            Self::Ideal => Box::new(Counted::shared(sizes.shared_tokens, models)),
        })
    }
}

/// The share of our pool's budget that is parked at most, and that is made ahead for all models
/// together, as a divisor.
const SHARE: usize = 16;
/// So large that our whole pool changes hands within a tenth of a second, so small that a chunk
/// seldom stays for one block.
const CHUNK_BYTES_MAX: usize = 32 << 20;

/// How much memory there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Tokens of KV that each model has in the static split.
    pub static_tokens: usize,
    /// Tokens of KV that the models share in the other pools.
    pub shared_tokens: usize,
}

impl Sizes {
    /// As published: 0.31 of the card less weights and activations for each of three models, or all
    /// of it shared.
    pub const PUBLISHED: Self = Self {
        static_tokens: 62_000,
        shared_tokens: 213_000,
    };

    /// The same shared memory, of which each of this many models has an equal part in the static
    /// split.
    pub fn split(models: usize) -> Self {
        let static_tokens = Self::PUBLISHED.shared_tokens / models;
        Self {
            static_tokens,
            ..Self::PUBLISHED
        }
    }
}

/// A figure of an outcome, with its name.
pub type Figure = (&'static str, fn(&Served) -> f64);

const MEAN: Figure = ("mean time to first token", |outcome| {
    outcome.first_token.mean() / 1e6
});
/// The time that most requests wait at most.
pub const P99: Figure = ("p99 time to first token", |outcome| {
    outcome.first_token.quantile(990) / 1e6
});
const PER_TOKEN: Figure = ("mean time per token", |outcome| {
    outcome.per_token.mean() / 1e6
});

/// What came of a workload in each pool.
pub struct Contest {
    /// What the workload was.
    pub name: String,
    quick: bool,
    outcomes: Vec<Served>,
}

impl Contest {
    /// Runs variants of a workload, each with the requests of all models, in each pool, and takes
    /// all of a pool together.
    pub fn hold(
        name: &str,
        quick: bool,
        variants: &[Vec<Vec<Request>>],
        sizes: Sizes,
    ) -> Result<Self> {
        let time = |prompt, decodes| TimeModel::FITTED.step(prompt, decodes);
        let outcomes = Pool::ALL.map(|pool| {
            let mut served = Served::default();
            variants.iter().try_for_each(|models| {
                let mut memory = pool.memory(sizes, models.len())?;
                let limits = Limits::DEFAULT;
                Server::new(models, &mut *memory, limits, &time, &mut served).run(u64::MAX)
            })?;
            Ok(served)
        });
        Ok(Self {
            name: name.to_owned(),
            quick,
            outcomes: outcomes
                .into_iter()
                .collect::<Result<_>>()
                .context(name.to_owned())?,
        })
    }

    /// What came of it in one pool.
    pub fn of(&self, pool: Pool) -> &Served {
        &self.outcomes[pool as usize]
    }

    /// The 99th percentile of the time to first token.
    pub fn p99_ms(&self, pool: Pool) -> f64 {
        P99.1(self.of(pool))
    }

    /// Judges a figure of ours against that of another pool.
    pub fn judge(&self, figure: Figure, unit: &str, against: Pool, reach: &str) -> Finding {
        let name = format!("{}: {}: {}", self.name, figure.0, against.name());
        let of = |pool| figure.1(self.of(pool));
        let finding = Finding::new(&name, unit, reach).judge(of(Pool::Ours), Some(of(against)));
        told(self.quick, finding)
    }

    /// Ours must never be slower than the page-at-a-time pool.
    pub fn never_slower(&self) -> impl Iterator<Item = Finding> {
        let judge = |figure| self.judge(figure, "ms", Pool::PageAtATime, "≤ 1 ×");
        [MEAN, P99, PER_TOKEN].into_iter().map(judge)
    }
}

/// A figure of a quick run is told and not judged.
pub fn told(quick: bool, finding: Finding) -> Finding {
    match quick {
        true => finding.unjudged().noted("a quick run is not judged"),
        false => finding,
    }
}
