//! Ours: each model is a range of a [`SharedMemoryPool`], and a block is a page of it.
//!
//! Freed blocks stay parked up to a watermark, blocks beyond the last one are made ahead, and the worker's step has a thread
//! and a clock of its own. What one model has parked another takes back by asking for memory.
//!
//! # Safety
//! `compact_model` asks that nobody launches work on the model's memory meanwhile. No work is launched here at all: the card
//! is simulated, and only its memory is used.
#![allow(unsafe_code)]

use super::{BLOCK_BYTES, Memory};
use crate::card::{Card, Costs};
use anyhow::Result;
use cuda_vmm::{
    EngineOptions, ModelOptions, SharedMemoryPool, SharedPoolOptions, Stream, VirtualMemoryPool,
    WorkerMode,
};
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

/// How the pool is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Freed memory that stays mapped, for all models together, in bytes.
    pub park_bytes_max: usize,
    /// Memory made ahead of each model, in bytes.
    pub ahead_bytes_max: usize,
    /// The largest chunk in bytes.
    pub chunk_bytes_max: usize,
}

/// One part in so many of the budget is parked at most, and one is made ahead for all models together.
const SHARE: usize = 16;
/// So large that the whole pool changes hands within a tenth of a second, so small that a chunk seldom stays for one block.
const CHUNK_BYTES_MAX: usize = 32 << 20;

impl Settings {
    /// What serves all workloads here. What is parked or made ahead is in nobody's way where there is one model only.
    pub fn of(limit_bytes: usize, models: usize) -> Self {
        let share_bytes = match models {
            1 => limit_bytes,
            _ => limit_bytes / SHARE,
        };
        Self {
            park_bytes_max: share_bytes,
            ahead_bytes_max: share_bytes / models,
            chunk_bytes_max: CHUNK_BYTES_MAX,
        }
    }
}

/// One model's range.
struct Model {
    range: Arc<VirtualMemoryPool>,
    /// Blocks that are not live.
    unused: BTreeSet<u32>,
    /// Beyond the highest block that was ever live.
    end: u32,
    /// Whether blocks were taken below it since memory was last made ahead.
    has_strayed: bool,
}

/// Models that share a budget.
pub struct Elastic {
    models: Vec<Model>,
    pool: SharedMemoryPool,
    limit: usize,
    /// Calls on the stepping thread.
    calls: u64,
    card: Card,
}

impl Elastic {
    /// A pool with a budget in bytes for so many models.
    ///
    /// # Errors
    /// If there is no simulator here, or the pool refuses its options.
    pub fn new(
        limit_bytes: usize,
        models: usize,
        costs: Costs,
        settings: Settings,
    ) -> Result<Self> {
        let mut card = Card::new(costs)?;
        let limit = limit_bytes / BLOCK_BYTES;
        let engine = EngineOptions::new()
            .limit_bytes(limit_bytes)
            .park_bytes_max(settings.park_bytes_max)
            .chunk_bytes_max(settings.chunk_bytes_max)
            .worker(WorkerMode::Manual);
        let options = SharedPoolOptions::new()
            .engine(engine)
            .page_bytes(BLOCK_BYTES);
        let pool = SharedMemoryPool::with_options(&card.device, options)?;
        let models = (0..models).map(|model| {
            let name = model.to_string();
            let options = ModelOptions {
                ahead_bytes_max: settings.ahead_bytes_max,
                ..ModelOptions::new(limit * BLOCK_BYTES)
            };
            pool.register_model_with(&name, options)?;
            let range = pool.model(&name)?;
            range.use_stream(&Stream::new(&card.device)?)?;
            let unused = (0..limit as u32).collect();
            Ok(Model {
                range,
                unused,
                end: 0,
                has_strayed: false,
            })
        });
        let models = models.collect::<Result<_>>()?;
        // What is ahead of the first request is made before it comes, as an engine's start does it.
        pool.engine().step();
        card.begin();
        Ok(Self {
            models,
            pool,
            limit,
            calls: 0,
            card,
        })
    }
}

impl Elastic {
    /// Has the background give back what an idle model holds beside its live blocks.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn go_idle(&mut self, model: usize, now_ns: u64) -> Result<()> {
        let pool = self.pool.clone();
        self.card.behind(now_ns, move || {
            // SAFETY: nobody launches work; see the module's documentation.
            unsafe { pool.compact_model(&model.to_string()) }
        })??;
        Ok(())
    }
}

/// Neighbours among rising numbers, as ranges of bytes.
fn runs(blocks: &[u32]) -> impl Iterator<Item = Range<usize>> + '_ {
    let runs = blocks.chunk_by(|one, next| one + 1 == *next);
    runs.map(|run| {
        let start = run[0] as usize * BLOCK_BYTES;
        start..start + run.len() * BLOCK_BYTES
    })
}

impl Model {
    /// Where the range grows next, if its latest allocation was elsewhere.
    ///
    /// The pool makes memory ahead of the latest allocation and gives back what is ahead of earlier ones. For a block table only
    /// the place beyond its highest block counts, so that is allocated and freed again before the worker's step.
    fn end(&mut self) -> Option<(Arc<VirtualMemoryPool>, usize)> {
        let has_strayed = std::mem::take(&mut self.has_strayed);
        let offset = self.end as usize * BLOCK_BYTES;
        let wanted = has_strayed && offset < self.range.capacity_bytes();
        wanted.then(|| (self.range.clone(), offset))
    }

    /// Makes the lowest unused blocks live, or none where there is no memory for them.
    fn take(&mut self, count: usize) -> Result<Option<Vec<u32>>> {
        let chosen: Vec<_> = self.unused.iter().copied().take(count).collect();
        if chosen.len() < count {
            return Ok(None);
        }
        let mut taken = Vec::new();
        for run in runs(&chosen) {
            match self.range.allocate(run.start, run.len()) {
                Ok(_) => taken.push(run),
                Err(error) if error.is_out_of_memory() => {
                    for run in taken {
                        self.range.deallocate(run.start, run.len())?;
                    }
                    return Ok(None);
                }
                Err(error) => return Err(error.into()),
            }
        }
        for block in &chosen {
            self.unused.remove(block);
            self.has_strayed = *block < self.end;
            self.end = self.end.max(*block + 1);
        }
        Ok(Some(chosen))
    }
}

impl Memory for Elastic {
    fn most_blocks(&self, _: usize) -> usize {
        self.limit
    }

    /// All but what is live, and the slack of others, which they have to themselves.
    fn free_blocks(&self, model: usize) -> usize {
        let all = self.pool.stats();
        let own = self.models[model].range.stats();
        let gone = all.parts.live_page_bytes + all.parts.slack_bytes - own.parts.slack_bytes
            + all.parts.quarantined_bytes;
        self.limit - gone / BLOCK_BYTES
    }

    fn take(
        &mut self,
        now_ns: &mut u64,
        model: usize,
        count: usize,
        blocks: &mut Vec<u32>,
    ) -> Result<bool> {
        let before = self.card.memory_calls();
        let own = &mut self.models[model];
        let taken = self.card.call(now_ns, || own.take(count))?;
        self.calls += self.card.memory_calls() - before;
        let has = taken.is_some();
        blocks.extend(taken.into_iter().flatten());
        Ok(has)
    }

    fn give(&mut self, now_ns: &mut u64, model: usize, blocks: &mut Vec<u32>) -> Result<()> {
        blocks.sort_unstable();
        let own = &mut self.models[model];
        self.card.call(now_ns, || {
            runs(blocks).try_for_each(|run| own.range.deallocate(run.start, run.len()))
        })?;
        own.unused.extend(blocks.drain(..));
        Ok(())
    }

    fn work(&mut self, now_ns: u64) -> Result<()> {
        let engine = self.pool.engine().clone();
        let ends: Vec<_> = self.models.iter_mut().filter_map(Model::end).collect();
        self.card.behind(now_ns, move || {
            for (range, offset) in ends {
                // Where there is no memory for it, none is made ahead either.
                if range.allocate(offset, BLOCK_BYTES).is_ok() {
                    range.deallocate(offset, BLOCK_BYTES)?;
                }
            }
            engine.step();
            Ok(())
        })?
    }

    fn held_bytes(&self, model: usize) -> u64 {
        self.models[model].range.stats().committed_bytes as u64
    }

    fn memory_calls(&self) -> u64 {
        self.calls
    }
}
