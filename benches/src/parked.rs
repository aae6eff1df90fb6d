//! Threads that take back parked pages at the same time, each those of a model of its own.

use anyhow::{Context, Result, ensure};
use cuda_vmm::{
    Device, EngineOptions, SharedMemoryPool, SharedPoolOptions, Stream, VirtualMemoryPool,
    WorkerMode,
};
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
    /// So many models with so many pages each.
    ///
    /// # Errors
    ///
    /// The pool's, if there is no memory for all of them.
    pub fn new(device: &Device, stream: &Stream, count: usize, pages: usize) -> Result<Self> {
        let page_bytes = device.granularity_bytes();
        let bytes = pages * page_bytes;
        let options = SharedPoolOptions::new()
            .engine(
                EngineOptions::new()
                    .chunk_bytes_max(0)
                    .park_bytes_max(count * bytes)
                    .worker(WorkerMode::Manual),
            )
            .page_bytes(page_bytes);
        let shared = SharedMemoryPool::with_options(device, options)?;
        let mut models = Vec::with_capacity(count);
        for number in 0..count {
            let name = format!("model {number}");
            shared.register_model(&name, bytes)?;
            let model = shared.model(&name)?;
            model.use_stream(stream)?;
            model.allocate(0, bytes)?;
            models.push(model);
        }
        let stream = stream.clone();
        Ok(Self { models, stream })
    }

    /// As many threads as are asked for take all pages back, one by one, each those of one model; the time from when the
    /// first began until a thread ended, the mean of all.
    ///
    /// Not until the last ended: threads do not end together, and what a core is kept from by others would count for all.
    ///
    /// Before that each thread parks these pages itself, one thread after the other. Else the books of some models would
    /// lie in the cache of another core, whoever parked them, and what was measured were the ways between cores.
    ///
    /// # Errors
    ///
    /// The pool's.
    pub fn take(&self, threads: usize) -> Result<Duration> {
        let parked = AtomicUsize::new(0);
        // Without sleeping or yielding: a thread that does may find itself on the same core as another.
        let wait_for = |least: usize| {
            while parked.load(Ordering::SeqCst) < least {
                std::hint::spin_loop();
            }
        };
        let take = |number: usize, model: &VirtualMemoryPool| {
            wait_for(number);
            let outcome = self.park(model);
            // Also where it failed, so that nobody waits for ever.
            parked.fetch_add(1, Ordering::SeqCst);
            wait_for(threads);
            outcome?;
            let started = Instant::now();
            for offset in (0..model.capacity_bytes()).step_by(model.page_bytes()) {
                model.allocate(offset, model.page_bytes())?;
            }
            anyhow::Ok((started, Instant::now()))
        };
        let spans = thread::scope(|scope| {
            let models = self.models[..threads].iter().enumerate();
            let take = &take;
            let threads: Vec<_> = models
                .map(|(number, model)| scope.spawn(move || take(number, model)))
                .collect();
            let spans = threads.into_iter().map(|thread| match thread.join() {
                Ok(span) => span,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            spans.collect::<Result<Vec<_>>>()
        })?;
        let first = spans.iter().map(|(started, _)| *started).min();
        let first = first.context("no thread")?;
        let sum: Duration = spans.iter().map(|(_, ended)| *ended - first).sum();
        Ok(sum / spans.len() as u32)
    }

    /// Frees all pages of a model, and waits until they are parked.
    fn park(&self, model: &VirtualMemoryPool) -> Result<()> {
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
