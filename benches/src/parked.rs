//! Threads that take back parked pages at the same time, each those of a model of its own.

use crate::shared::{SharedSizes, shared_models};
use anyhow::{Context, Result, ensure};
use cuda_vmm::{Device, EngineOptions, Stream, VirtualMemoryPool, WorkerMode};
use std::hint::black_box;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// For how long the device may work on pages that were freed.
const PATIENCE: Duration = Duration::from_secs(10);

/// Models of one shared pool, whose pages are taken back, each a chunk of its own.
#[derive(Debug)]
pub struct ParkedModels {
    models: Vec<Arc<VirtualMemoryPool>>,
    stream: Stream,
}

impl ParkedModels {
    /// This many models with this many pages each.
    ///
    /// # Errors
    ///
    /// The pool's, if there is no memory for all of them.
    pub fn new(device: &Device, stream: &Stream, count: usize, pages: usize) -> Result<Self> {
        let page_bytes = device.granularity_bytes();
        let bytes = pages * page_bytes;
        let engine = EngineOptions::new()
            .chunk_bytes_max(0)
            .park_bytes_max(count * bytes)
            .worker(WorkerMode::Manual);
        let sizes = SharedSizes {
            page_bytes,
            capacity_bytes: bytes,
            ahead_bytes: 0,
        };
        let (_, models) = shared_models(device, engine, sizes, &vec![stream.clone(); count])?;
        for model in &models {
            model.allocate(0, bytes)?;
        }
        let stream = stream.clone();
        Ok(Self { models, stream })
    }

    /// Each of this many threads takes all pages of one model back, one by one. Returns the time
    /// from when the first began until a thread ended, the mean of all.
    ///
    /// Not until the last ended: threads do not end together, and what a core is kept from by
    /// others would count for all.
    ///
    /// Before that each thread parks these pages itself, one thread after the other. Else the books
    /// of some models would lie in the cache of the core that parked them, and what was measured
    /// were the ways between cores.
    ///
    /// # Errors
    ///
    /// The pool's.
    pub fn take(&self, threads: usize) -> Result<Duration> {
        let parked = AtomicUsize::new(0);
        // Without sleeping or yielding: a thread that does may find itself on the same core as
        // another.
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
    ///
    /// # Errors
    ///
    /// The pool's.
    pub fn take_back(&self, model: usize) -> Result<()> {
        let model = &self.models[model];
        for offset in (0..model.capacity_bytes()).step_by(model.page_bytes()) {
            black_box(model.allocate(offset, model.page_bytes())?);
        }
        Ok(())
    }

    /// Frees all pages of a model, and waits until they are parked.
    ///
    /// # Errors
    ///
    /// The pool's, or if they are not parked in time.
    pub fn park(&self, model: usize) -> Result<()> {
        let model = &self.models[model];
        model.deallocate(0, model.capacity_bytes())?;
        self.stream.synchronize()?;
        let started = Instant::now();
        while model.stats().parts.parked_bytes < model.capacity_bytes() {
            ensure!(started.elapsed() < PATIENCE, "pages are not parked");
            model.engine().step();
        }
        Ok(())
    }
}
