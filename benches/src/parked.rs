//! Threads that take back parked pages at the same time, each those of a model of its own.

use anyhow::{Context, Result, ensure};
use cuda_vmm::{
    Device, EngineOptions, SharedMemoryPool, SharedPoolOptions, Stream, VirtualMemoryPool,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// For how long the device may work on pages that were freed.
const PATIENCE: Duration = Duration::from_secs(10);

/// Models of one shared pool, whose pages are parked, each a chunk of its own.
#[derive(Debug)]
pub struct ParkedModels {
    shared: SharedMemoryPool,
    models: Vec<Arc<VirtualMemoryPool>>,
    stream: Stream,
    pages: usize,
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
        let options = SharedPoolOptions {
            engine: EngineOptions::new()
                .chunk_bytes_max(0)
                .park_bytes_max(count * bytes),
            page_bytes: Some(page_bytes),
        };
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
        let parked = Self {
            shared,
            models,
            stream: stream.clone(),
            pages,
        };
        parked.park(count)?;
        Ok(parked)
    }

    /// As many threads as are asked for take all pages back, one by one, each those of one model; the time from when the
    /// first began until the last ended. Then they are parked again.
    ///
    /// # Errors
    ///
    /// The pool's.
    pub fn take(&self, threads: usize) -> Result<Duration> {
        let ready = AtomicUsize::new(0);
        let take = |model: &VirtualMemoryPool| {
            ready.fetch_add(1, Ordering::SeqCst);
            while ready.load(Ordering::SeqCst) < threads {
                thread::yield_now();
            }
            let started = Instant::now();
            for page in 0..self.pages {
                model.allocate(page * model.page_bytes(), model.page_bytes())?;
            }
            anyhow::Ok((started, Instant::now()))
        };
        let spans = thread::scope(|scope| {
            let models = self.models[..threads].iter();
            let threads: Vec<_> = models.map(|model| scope.spawn(|| take(model))).collect();
            let spans = threads.into_iter().map(|thread| match thread.join() {
                Ok(span) => span,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            spans.collect::<Result<Vec<_>>>()
        })?;
        self.park(threads)?;
        let first = spans.iter().map(|(started, _)| *started).min();
        let last = spans.iter().map(|(_, ended)| *ended).max();
        let span = first.zip(last).map(|(first, last)| last - first);
        span.context("no thread")
    }

    /// Frees all pages of the first models, and waits until they are parked.
    fn park(&self, count: usize) -> Result<()> {
        for model in &self.models[..count] {
            model.deallocate(0, model.capacity_bytes())?;
        }
        self.stream.synchronize()?;
        let started = Instant::now();
        loop {
            let stats = self.shared.stats();
            if stats.parked_bytes == stats.committed_bytes {
                return Ok(());
            }
            ensure!(started.elapsed() < PATIENCE, "pages are not parked");
            self.shared.engine().step();
        }
    }
}
