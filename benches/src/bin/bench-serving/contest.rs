//! One workload in four pools.

use crate::card::Costs;
use crate::outcome::Outcome;
use crate::pools::elastic::{Elastic, Settings};
use crate::pools::ideal::Ideal;
use crate::pools::page_at_a_time::PageAtATime;
use crate::pools::static_split::StaticSplit;
use crate::pools::{Memory, TOKEN_BYTES, blocks_within};
use crate::scheduler::Limits;
use crate::simulation;
use crate::time_model::TimeModel;
use crate::workload::Workload;
use anyhow::{Context, Result};

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

    /// As it is told.
    pub fn name(self) -> &'static str {
        match self {
            Self::StaticSplit => "static split",
            Self::PageAtATime => "page at a time",
            Self::Ours => "ours",
            Self::Ideal => "ideal",
        }
    }

    fn memory(self, sizes: Sizes, models: usize, costs: Costs) -> Result<Box<dyn Memory>> {
        let shared = blocks_within(sizes.shared_tokens);
        Ok(match self {
            Self::StaticSplit => {
                Box::new(StaticSplit::new(blocks_within(sizes.static_tokens), models))
            }
            Self::PageAtATime => Box::new(PageAtATime::new(shared, models, costs)?),
            Self::Ours => {
                let limit_bytes = sizes.shared_tokens * TOKEN_BYTES;
                Box::new(Elastic::new(
                    limit_bytes,
                    models,
                    costs,
                    Settings::of(limit_bytes, models),
                )?)
            }
            Self::Ideal => Box::new(Ideal::new(shared, models)),
        })
    }
}

/// How much memory there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Tokens of KV that each model has in the static split.
    pub static_tokens: usize,
    /// Tokens of KV that the models share in the other pools.
    pub shared_tokens: usize,
}

/// What came of a workload in each pool.
pub struct Contest {
    /// What the workload was.
    pub name: String,
    outcomes: Vec<Outcome>,
}

impl Contest {
    /// Runs variants of a workload in each pool, and takes all of a pool together.
    ///
    /// # Errors
    /// If a pool fails, or there is no variant.
    pub fn hold(name: &str, variants: &[Workload], sizes: Sizes) -> Result<Self> {
        let outcomes = Pool::ALL.map(|pool| {
            let mut all: Option<Outcome> = None;
            for workload in variants {
                let one = run(pool, workload, sizes, Costs::Measured)
                    .with_context(|| format!("{name}, {}", pool.name()))?;
                all = Some(match all {
                    Some(all) => all.merged(one),
                    None => one,
                });
            }
            all.context("no workload")
        });
        Ok(Self {
            name: name.to_owned(),
            outcomes: outcomes.into_iter().collect::<Result<_>>()?,
        })
    }

    /// What came of it in one pool.
    pub fn of(&self, pool: Pool) -> &Outcome {
        &self.outcomes[pool as usize]
    }
}

/// Runs a workload in a pool, as fitted and by default.
///
/// # Errors
/// If the pool fails.
pub fn run(pool: Pool, workload: &Workload, sizes: Sizes, costs: Costs) -> Result<Outcome> {
    let mut memory = pool.memory(sizes, workload.models.len(), costs)?;
    simulation::run(workload, &mut *memory, TimeModel::FITTED, Limits::DEFAULT)
}
