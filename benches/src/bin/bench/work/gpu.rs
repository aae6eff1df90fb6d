//! A GPU that runs models' steps: memory traffic takes the time that each stands for. Blocks of the
//! models are pages of a pool, or all have memory from the beginning.

use crate::bare::Plain;
use crate::traffic::Traffic;
use anyhow::Result;
use cuda_vmm::{EngineOptions, SharedMemoryPool, VirtualMemoryPool};
use cuda_vmm_benches::serving::{BLOCK_BYTES, Memory, allocate_runs, runs};
use cuda_vmm_benches::shared_models;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Free blocks, the next at the end: the last freed, whose memory is likely to be there still.
type Free = Vec<u32>;

fn all(blocks: usize) -> Free {
    (0..blocks as u32).rev().collect()
}

/// Takes this many blocks out, in order; `None` if there are fewer.
fn pick(free: &mut Free, wanted: usize) -> Option<Vec<u32>> {
    let left = free.len().checked_sub(wanted)?;
    let mut picked = free.split_off(left);
    picked.sort_unstable();
    Some(picked)
}

/// Puts blocks back that are in order, the lowest on top.
fn put(free: &mut Free, blocks: &[u32]) {
    free.extend(blocks.iter().rev());
}

struct Model {
    /// The range whose memory comes and goes; none if all blocks have memory from the beginning.
    range: Option<Arc<VirtualMemoryPool>>,
    base_address: u64,
    /// Which of the lists of free blocks is its own, or is shared.
    list: usize,
    used: usize,
}

impl Model {
    fn address(&self, block: u32) -> u64 {
        self.base_address + u64::from(block) * BLOCK_BYTES as u64
    }
}

/// The models, whose steps are on the traffic's stream.
pub struct Gpu<'a> {
    traffic: &'a Traffic,
    models: Vec<Model>,
    free: Vec<Free>,
    /// How many blocks a model can have.
    blocks: usize,
    /// Addresses of blocks that were taken since the last step, and that it writes to.
    taken: Vec<u64>,
    started: Instant,
    /// How much faster than the clock time goes by.
    pub speed: f64,
    /// A pool that is looked at each second, the last second, and the most committed bytes seen.
    pub watched: Option<(SharedMemoryPool, u64, usize)>,
}

impl<'a> Gpu<'a> {
    fn new(traffic: &'a Traffic, models: Vec<Model>, blocks: usize) -> Self {
        Self {
            traffic,
            free: vec![all(blocks); models.len()],
            models,
            blocks,
            taken: Vec::new(),
            started: Instant::now(),
            speed: 1.0,
            watched: None,
        }
    }

    /// Models of a shared pool, whose blocks get memory when they are taken. It is given the bytes
    /// that all models have, that stay mapped when they are freed, and that are made ahead of each.
    pub fn elastic(
        traffic: &'a Traffic,
        models: usize,
        [limit_bytes, park_bytes, ahead_bytes]: [usize; 3],
    ) -> Result<(SharedMemoryPool, Self)> {
        let engine = EngineOptions::new().limit_bytes(limit_bytes);
        let engine = engine.park_bytes_max(park_bytes).chunk_bytes_max(0);
        let sizes = (limit_bytes, ahead_bytes);
        let streams = vec![traffic.stream.clone(); models];
        let (pool, ranges) = shared_models(engine, sizes, &streams)?;
        let blocks = limit_bytes / BLOCK_BYTES;
        let ranges = ranges.into_iter().enumerate();
        let models = ranges.map(|(list, range)| Model {
            base_address: range.base_address(),
            range: Some(range),
            list,
            used: 0,
        });
        Ok((pool, Self::new(traffic, models.collect(), blocks)))
    }

    /// This many models that share blocks which all have memory.
    pub fn backed(traffic: &'a Traffic, models: usize, (plain, bytes): (&Plain, usize)) -> Self {
        let models = (0..models).map(|_| Model {
            range: None,
            base_address: plain.address(),
            list: 0,
            used: 0,
        });
        Self::new(traffic, models.collect(), bytes / BLOCK_BYTES)
    }

    fn look_at_clock(&mut self, now_ns: &mut u64) {
        let now_s = self.started.elapsed().as_secs_f64() * self.speed;
        *now_ns = (now_s * 1e9) as u64;
        if let Some((pool, second, most_bytes)) = &mut self.watched
            && now_s as u64 > *second
        {
            *second = now_s as u64;
            *most_bytes = pool.stats().committed_bytes.max(*most_bytes);
        }
    }
}

impl Memory for Gpu<'_> {
    fn most_blocks(&self, _: usize) -> usize {
        self.blocks
    }

    /// As many as there are: whether there is memory for them is known when they are taken.
    fn free_blocks(&self, _: usize) -> usize {
        self.blocks
    }

    fn take(&mut self, now_ns: &mut u64, model: usize, count: usize) -> Result<Option<Vec<u32>>> {
        let own = &mut self.models[model];
        let Some(picked) = pick(&mut self.free[own.list], count) else {
            return Ok(None);
        };
        if let Some(range) = &own.range {
            let runs = runs(&picked);
            let started = Instant::now();
            // It may wait for a page that the worker is making, or for freed memory.
            let taken = allocate_runs(range, &runs);
            *now_ns += started.elapsed().as_nanos() as u64;
            if !matches!(taken, Ok(true)) {
                put(&mut self.free[own.list], &picked);
                return taken.map(|_| None);
            }
        }
        own.used += count;
        let addresses = picked.iter().map(|block| own.address(*block));
        self.taken.extend(addresses);
        Ok(Some(picked))
    }

    fn give(&mut self, now_ns: &mut u64, model: usize, mut blocks: Vec<u32>) -> Result<()> {
        blocks.sort_unstable();
        let own = &mut self.models[model];
        let given: Vec<_> = blocks.iter().map(|block| own.address(*block)).collect();
        self.taken.retain(|address| !given.contains(address));
        if let Some(range) = &own.range {
            let runs = runs(&blocks);
            let started = Instant::now();
            let outcome = range.deallocate_many(&runs);
            *now_ns += started.elapsed().as_nanos() as u64;
            outcome?;
        }
        own.used -= blocks.len();
        put(&mut self.free[own.list], &blocks);
        Ok(())
    }

    fn step(&mut self, now_ns: &mut u64, time_ns: u64) -> Result<()> {
        let (kernel, stream) = (self.traffic.kernel, &self.traffic.stream);
        for target in self.taken.drain(..) {
            // SAFETY: the block is live until after this step, which synchronises the stream below.
            unsafe { kernel.write(stream, target, BLOCK_BYTES, BLOCK_BYTES) }?;
        }
        self.traffic.queue_for(Duration::from_nanos(time_ns))?;
        stream.synchronize()?;
        self.look_at_clock(now_ns);
        Ok(())
    }

    fn idle(&mut self, now_ns: &mut u64, time_ns: u64) -> Result<()> {
        // Nothing can come of looking all the time.
        std::thread::sleep(Duration::from_nanos(time_ns).min(Duration::from_micros(100)));
        self.look_at_clock(now_ns);
        Ok(())
    }

    fn held_bytes(&self, model: usize) -> u64 {
        (self.models[model].used * BLOCK_BYTES) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_in_use_once_and_the_last_freed_come_first() {
        let mut free = all(6);
        assert_eq!(pick(&mut free, 4), Some(vec![0, 1, 2, 3]));
        put(&mut free, &[1, 3]);
        assert_eq!(free.len(), 4);
        assert_eq!(pick(&mut free, 5), None);
        assert_eq!(pick(&mut free, 1), Some(vec![1]));
        assert_eq!(pick(&mut free, 3), Some(vec![3, 4, 5]));
        assert_eq!(pick(&mut free, 1), None);
    }
}
