//! Ours: each model is a range of a [`SharedMemoryPool`], and a block is a page of it.
//!
//! Freed blocks stay parked up to a watermark, blocks beyond the last one are made ahead, and the
//! worker's step has a thread and a clock of its own. A model's request takes back parked memory.
//!
//! # Safety
//! `compact_shared` asks that no work is launched on the model's memory meanwhile. None is launched
//! here at all.
#![allow(unsafe_code)]

use crate::card::Card;
use anyhow::Result;
use cuda_vmm::{EngineOptions, SharedMemoryPool, Stream, VirtualMemoryPool, WorkerMode};
use cuda_vmm_benches::serving::{BLOCK_BYTES, Memory, allocate_runs, runs};
use cuda_vmm_benches::shared_models;
use cuda_vmm_sim::CostModel;
use std::collections::BTreeSet;
use std::sync::Arc;

struct Model {
    range: Arc<VirtualMemoryPool>,
    unused: BTreeSet<u32>,
    /// Beyond the highest block that was ever live.
    end: u32,
    /// Whether blocks were taken below it since memory was last made ahead.
    has_strayed: bool,
}

pub struct Elastic {
    models: Vec<Model>,
    pool: SharedMemoryPool,
    limit: usize,
    card: Card,
}

impl Elastic {
    /// A pool of `limit` blocks. `share_bytes` are parked at most, and made ahead for all together.
    pub fn new(
        limit: usize,
        models: usize,
        costs: Option<CostModel>,
        (share_bytes, chunk_bytes_max): (usize, usize),
    ) -> Result<Self> {
        let mut card = Card::new(costs)?;
        let limit_bytes = limit * BLOCK_BYTES;
        let engine = EngineOptions::new().worker(WorkerMode::Manual);
        let engine = engine.limit_bytes(limit_bytes).park_bytes_max(share_bytes);
        let engine = engine.chunk_bytes_max(chunk_bytes_max);
        let sizes = (limit_bytes, share_bytes / models);
        let streams = (0..models).map(|_| Stream::new(&card.device));
        let streams = streams.collect::<cuda_vmm::Result<Vec<_>>>()?;
        let (pool, ranges) = shared_models(engine, sizes, &streams)?;
        let models = ranges.into_iter().map(|range| Model {
            range,
            unused: (0..limit as u32).collect(),
            end: 0,
            has_strayed: false,
        });
        let models = models.collect();
        // What is ahead of the first request is made before it comes, as an engine's start does it.
        pool.engine().step();
        card.begin();
        Ok(Self {
            models,
            pool,
            limit,
            card,
        })
    }
}

impl Model {
    /// Has the pool make memory ahead of the highest block, if the latest allocation was elsewhere.
    ///
    /// The pool makes memory ahead of the latest allocation and gives back what is ahead of earlier
    /// ones. A block table needs it beyond its highest block, so that is allocated and freed again.
    fn mark_end(&mut self) -> Result<()> {
        let has_strayed = std::mem::take(&mut self.has_strayed);
        let offset = self.end as usize * BLOCK_BYTES;
        // If there is no memory for it, none is made ahead either.
        if has_strayed
            && offset < self.range.capacity_bytes()
            && self.range.allocate(offset, BLOCK_BYTES).is_ok()
        {
            self.range.deallocate(offset, BLOCK_BYTES)?;
        }
        Ok(())
    }

    /// Makes the lowest unused blocks live, or none if there is no memory for them.
    fn take(&mut self, count: usize) -> Result<Option<Vec<u32>>> {
        let chosen: Vec<_> = self.unused.iter().copied().take(count).collect();
        if chosen.len() < count || !allocate_runs(&self.range, &runs(&chosen))? {
            return Ok(None);
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

    /// All except what is live, and the slack of others, which they have to themselves.
    fn free_blocks(&self, model: usize) -> usize {
        let all = self.pool.stats();
        let own = self.models[model].range.stats();
        let gone = all.parts.live_page_bytes + all.parts.slack_bytes - own.parts.slack_bytes
            + all.parts.quarantined_bytes;
        self.limit - gone / BLOCK_BYTES
    }

    fn take(&mut self, now_ns: &mut u64, model: usize, count: usize) -> Result<Option<Vec<u32>>> {
        let own = &mut self.models[model];
        self.card.call(now_ns, || own.take(count))
    }

    fn give(&mut self, now_ns: &mut u64, model: usize, mut blocks: Vec<u32>) -> Result<()> {
        blocks.sort_unstable();
        let own = &mut self.models[model];
        let mut runs = runs(&blocks).into_iter();
        self.card.call(now_ns, || {
            runs.try_for_each(|(offset, bytes)| own.range.deallocate(offset, bytes))
        })?;
        own.unused.extend(blocks);
        Ok(())
    }

    fn work(&mut self, now_ns: u64) -> Result<()> {
        let (models, pool) = (&mut self.models, &self.pool);
        self.card.behind(now_ns, || {
            models.iter_mut().try_for_each(Model::mark_end)?;
            pool.engine().step();
            Ok(())
        })
    }

    fn go_idle(&mut self, now_ns: u64, model: usize) -> Result<()> {
        let range = &self.models[model].range;
        self.card.behind(now_ns, || {
            // SAFETY: no work is launched; see the module's documentation.
            unsafe { range.compact_shared() }
        })?;
        Ok(())
    }

    fn held_bytes(&self, model: usize) -> u64 {
        self.models[model].range.stats().committed_bytes as u64
    }
}
