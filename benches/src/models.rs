//! Models of one shared pool, whose parked pages threads take back; and waiting for an engine.

use anyhow::{Context, Result, ensure};
use cuda_vmm::{Engine, EngineOptions, EngineStats, PoolOptions, Quota, SharedMemoryPool};
use cuda_vmm::{SharedPoolOptions, Stream, VirtualMemoryPool, WorkerMode};
use std::hint::black_box;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// A shared pool with a model for each stream of a device, which uses its memory. Each model has
/// addresses of `capacity_bytes`, and `ahead_bytes` are made ahead of it.
pub fn shared_models(
    engine: EngineOptions,
    (capacity_bytes, ahead_bytes): (usize, usize),
    streams: &[Stream],
) -> Result<(SharedMemoryPool, Vec<Arc<VirtualMemoryPool>>)> {
    let device = streams.first().context("no model")?.device();
    let shared = SharedMemoryPool::with_options(device, SharedPoolOptions::new().engine(engine))?;
    let mut models = Vec::with_capacity(streams.len());
    for (number, stream) in streams.iter().enumerate() {
        let account = shared.register_model(&format!("model {number}"), Quota::new())?;
        let options = PoolOptions::new().ahead_bytes_max(ahead_bytes);
        let page_bytes = shared.page_bytes();
        let model = VirtualMemoryPool::on_account(&account, capacity_bytes, page_bytes, options)?;
        model.use_stream(stream)?;
        models.push(Arc::new(model));
    }
    Ok((shared, models))
}

/// Models of one shared pool, whose pages are taken back, each a chunk of its own.
#[derive(Debug)]
pub struct ParkedModels {
    models: Vec<Arc<VirtualMemoryPool>>,
    stream: Stream,
}

impl ParkedModels {
    pub fn new(stream: &Stream, count: usize, pages: usize) -> Result<Self> {
        let bytes = pages * stream.device().granularity_bytes();
        let engine = EngineOptions::new().worker(WorkerMode::Manual);
        let engine = engine.chunk_bytes_max(0).park_bytes_max(count * bytes);
        let (_, models) = shared_models(engine, (bytes, 0), &vec![stream.clone(); count])?;
        for model in &models {
            model.allocate(0, bytes)?;
        }
        let stream = stream.clone();
        Ok(Self { models, stream })
    }

    /// Each of this many threads takes all pages of one model back, one by one. Returns the time
    /// from when the first began until a thread ended, the mean of all. Up to the last one's
    /// end, the delay of one core would count for all.
    ///
    /// Before that each thread in turn parks its pages, so that its own core's cache has the books.
    pub fn take(&self, threads: usize) -> Result<Duration> {
        let parked = AtomicUsize::new(0);
        // Without sleeping or yielding, after which threads may find themselves on one core.
        let wait_for = |least: usize| {
            while parked.load(Ordering::SeqCst) < least {
                std::hint::spin_loop();
            }
        };
        let take = |number: usize| {
            wait_for(number);
            let outcome = self.park(number);
            // Also if it failed, so that no thread waits for ever.
            parked.fetch_add(1, Ordering::SeqCst);
            wait_for(threads);
            outcome?;
            let started = Instant::now();
            self.take_back(number)?;
            anyhow::Ok((started, Instant::now()))
        };
        let spans = thread::scope(|scope| {
            let take = &take;
            let threads = (0..threads).map(|number| scope.spawn(move || take(number)));
            let threads: Vec<_> = threads.collect();
            let spans = threads.into_iter().map(|thread| thread.join());
            let spans = spans.map(|span| span.unwrap_or_else(|panic| resume_unwind(panic)));
            spans.collect::<Result<Vec<_>>>()
        })?;
        let first = spans.iter().map(|(started, _)| *started).min();
        let first = first.context("no thread")?;
        let sum: Duration = spans.iter().map(|(_, ended)| *ended - first).sum();
        Ok(sum / spans.len() as u32)
    }

    /// Takes all parked pages of a model back, one by one.
    pub fn take_back(&self, model: usize) -> Result<()> {
        let model = &self.models[model];
        for offset in (0..model.capacity_bytes()).step_by(model.page_bytes()) {
            black_box(model.allocate(offset, model.page_bytes())?);
        }
        Ok(())
    }

    /// Frees all pages of a model, and waits until they are parked.
    pub fn park(&self, model: usize) -> Result<()> {
        let model = &self.models[model];
        model.deallocate(0, model.capacity_bytes())?;
        self.stream.synchronize()?;
        step_until(model.engine(), "pages to be parked", |_| {
            Ok(model.stats().parts.parked_bytes == model.capacity_bytes())
        })
    }
}

/// For how long something may be waited for.
const PATIENCE: Duration = Duration::from_secs(10);

/// Steps an engine until its numbers are as they should be; an error if that takes too long.
pub fn step_until(
    engine: &Engine,
    what: &str,
    mut is_so: impl FnMut(&EngineStats) -> Result<bool>,
) -> Result<()> {
    let started = Instant::now();
    while !is_so(&engine.stats())? {
        ensure!(started.elapsed() < PATIENCE, "waited in vain for {what}");
        engine.step();
    }
    Ok(())
}

/// Waits until an engine's own thread has its numbers as they should be; an error if it lasts.
pub fn watch(engine: &Engine, what: &str, is_so: impl Fn(&EngineStats) -> bool) -> Result<()> {
    let started = Instant::now();
    while !is_so(&engine.stats()) {
        ensure!(started.elapsed() < PATIENCE, "waited in vain for {what}");
        std::hint::spin_loop();
    }
    Ok(())
}
