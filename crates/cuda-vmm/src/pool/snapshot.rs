//! Everything that an operator looks at, at one moment.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::PoolStats;
use crate::MemoryParts;
use crate::engine::{Engine, EngineCounters, EngineStats, Look, PoolCounters, RangeId};

/// One model of a [`SharedMemoryPool`](crate::SharedMemoryPool), as a [`Snapshot`] has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
#[non_exhaustive]
pub struct ModelSnapshot {
    /// Its name.
    pub model: String,
    /// Memory in bytes that is always to be had for it.
    pub guarantee_bytes: usize,
    /// The most memory in bytes that it may hold, if there is such a limit.
    pub ceiling_bytes: Option<usize>,
    /// What it holds, by parts, and its addresses.
    pub stats: PoolStats,
    /// What has happened.
    pub counters: PoolCounters,
}

/// An engine and the models on it at one moment.
///
/// The parts of [`engine`](Self::engine) are those of all [`models`](Self::models) and of [`others`](Self::others), one by
/// one, and their sum is what is committed; what each model holds is the sum of its own parts.
///
/// With the feature `serde` it can be written and read; a field that is missing then is read as zero.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
#[non_exhaustive]
pub struct Snapshot {
    /// What the engine holds.
    pub engine: EngineStats,
    /// What has happened on it.
    pub counters: EngineCounters,
    /// The models, by name.
    pub models: Vec<ModelSnapshot>,
    /// What is no model's: the cache, ranges that were made on the engine besides, and what is on its way out of models
    /// that are gone.
    pub others: MemoryParts,
}

impl Snapshot {
    /// Of an engine, some of whose ranges have names: with the bytes of their addresses and of a page.
    pub(super) fn of(engine: &Engine, names: Vec<(String, (RangeId, usize, usize))>) -> Self {
        let Look {
            stats,
            counters,
            ranges,
        } = engine.look();
        let mut others = stats.parts;
        let mut models = Vec::with_capacity(names.len());
        for (model, (id, capacity_bytes, page_bytes)) in names {
            // One that was unregistered meanwhile is no model any more.
            let Ok(at) = ranges.binary_search_by_key(&id, |(id, _)| *id) else {
                continue;
            };
            let range = ranges[at].1;
            let stats = PoolStats::new(capacity_bytes, page_bytes, range);
            others = others - stats.parts;
            let ceiling_bytes = range.quota.ceiling_bytes;
            models.push(ModelSnapshot {
                model,
                guarantee_bytes: range.quota.guarantee_bytes,
                ceiling_bytes: (ceiling_bytes < usize::MAX).then_some(ceiling_bytes),
                stats,
                counters: range.counters,
            });
        }
        Self {
            engine: stats,
            counters,
            models,
            others,
        }
    }
}

impl Engine {
    /// What it holds and what has happened, at one moment. Nothing has a name here, so all of it is
    /// [`others`](Snapshot::others); [`SharedMemoryPool::snapshot`](crate::SharedMemoryPool::snapshot) knows the models.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot::of(self, Vec::new())
    }
}
