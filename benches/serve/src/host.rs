//! Several models under one limit of memory, each on a thread of its own.

mod figures;
mod hosted;
mod metrics;
mod outbox;
mod peers;
mod serving;
mod shape;
mod sleep;
mod told;
mod waiting;

pub use shape::{Shape, ShapeError};

use crate::engine::{Budget, Policy};
use crate::figures::Figures;
use crate::request::{Backend, Ended, Event, Generate, ModelInfo, Refusal};
use candle_core::Device;
use candle_cuda_vmm::device::{core_device, cuda_with_own_stream};
use candle_cuda_vmm::{HostStore, Quota, Result, VmmError, cuda_vmm, keep_candle_memory};
use cuda_vmm::{SharedMemoryPool, Snapshot};
use hosted::{Common, Hosted};
use std::sync::mpsc::Receiver;
use std::time::Duration;
use tokio::sync::mpsc;
use told::{Command, Peer};

/// Pinned memory that files are read through when weights that sleep are loaded, in bytes.
const READING_BYTES: usize = 256 << 20;

/// Where models run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The CPU, with the simulated driver.
    Cpu,
    /// The GPU of this number.
    Gpu(usize),
}

impl Place {
    /// Makes a device object with a stream of its own.
    fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Gpu(ordinal) => cuda_with_own_stream(ordinal),
        }
    }
}

/// How models share the memory, and how much of it there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sharing {
    /// What all models may hold for K and V, in bytes; also for weights, if models sleep. With
    /// [`Policy::Ideal`] it is what their
    /// sequences may have in use, and they hold more.
    pub limit_bytes: usize,
    /// How blocks get their memory.
    pub policy: Policy,
    /// Sequences of a model that run at once.
    pub sequences_max: usize,
    /// Requests of a model that wait.
    pub waiting_max: usize,
    /// Tokens of prompts in a step.
    pub step_tokens_max: usize,
    /// How models sleep, if they do.
    pub sleeping: Option<Sleeping>,
}

/// Models that sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sleeping {
    /// After which time an idle model sleeps; never by itself if `None`.
    pub after: Option<Duration>,
    /// The most memory of the host for what models have while they sleep, in bytes.
    pub host_bytes: usize,
    /// How long a wake waits for memory that others hold.
    pub patience: Duration,
}

/// A model that is asked for: its name, what it is, and its quota of the memory.
#[derive(Clone, Debug)]
pub struct ModelSpec {
    /// The name that requests give.
    pub name: String,
    /// What it is.
    pub shape: Shape,
    /// Its guarantee, its ceiling and its priority.
    pub quota: Quota,
}

/// Models that serve.
pub struct Host {
    pool: SharedMemoryPool,
    budget: Option<Budget>,
    models: Vec<Hosted>,
    sleeps: bool,
}

impl Host {
    /// Makes all models, and captures their steps on a GPU.
    ///
    /// # Errors
    ///
    /// The first model that cannot be made; none is left then.
    pub fn new(place: Place, sharing: &Sharing, specs: Vec<ModelSpec>) -> Result<Self> {
        let device = place.open()?;
        if device.is_cuda() {
            // Each step waits for its tokens, and the next one needs as much memory.
            keep_candle_memory(&device, u64::MAX)?;
        }
        let device = core_device(&device)?;
        let count = specs.len();
        let (limit_bytes, budget) = match sharing.policy {
            Policy::Ideal => {
                // Each model has as much as the limit, up to a page more in each tensor.
                let all_bytes = sharing.limit_bytes.saturating_mul(2 * count);
                (all_bytes, Some(Budget::new(sharing.limit_bytes)))
            }
            _ => (sharing.limit_bytes, None),
        };
        let pool = SharedMemoryPool::new(&device, limit_bytes)?;
        let mut all_started = Vec::new();
        let mut host = Self {
            pool,
            budget,
            models: Vec::new(),
            sleeps: sharing.sleeping.is_some(),
        };
        let stores = match sharing.sleeping {
            Some(it) => {
                let store = |bytes| HostStore::new(&device, bytes);
                Some([store(it.host_bytes)?, store(READING_BYTES)?])
            }
            None => None,
        };
        let register = |spec: &ModelSpec| host.pool.register_model(&spec.name, spec.quota);
        let accounts: core::result::Result<Vec<_>, _> = specs.iter().map(register).collect();
        let (peers, commands): (Vec<_>, Vec<_>) = specs.iter().map(|_| Peer::new()).unzip();
        let common = Common {
            place,
            sharing: *sharing,
            accounts: accounts?,
            budget: host.budget.clone(),
            stores,
            peers: peers.into(),
        };
        for (own, (spec, commands)) in specs.into_iter().zip(commands).enumerate() {
            let (model, started) = Hosted::start(&common, own, commands, spec)?;
            host.models.push(model);
            match sharing.sleeping {
                // One after the other, so that those before it can make room.
                Some(_) => await_start(&started)?,
                None => all_started.push(started),
            }
        }
        // All are made at once, each on its thread.
        all_started.iter().try_for_each(await_start)?;
        Ok(host)
    }

    /// Ends all models, when what they run has ended, and waits for them.
    pub fn close(&self) {
        self.models.iter().for_each(Hosted::close);
    }

    /// Forgets all prefixes that nothing uses, and gives their memory back.
    pub fn clear_prefixes(&self) {
        self.models.iter().for_each(Hosted::clear_prefixes);
    }

    /// What sequences of all models have in use, with [`Policy::Ideal`].
    pub fn budget(&self) -> Option<&Budget> {
        self.budget.as_ref()
    }

    /// The memory of all models.
    pub fn pool(&self) -> &SharedMemoryPool {
        &self.pool
    }

    fn look(&self) -> (Snapshot, Figures) {
        // Before the snapshot, so that what a thread says it has freed is freed there too.
        let models = self.models.iter();
        let models: Vec<_> = models.map(|it| (&*it.info().id, it.work())).collect();
        let snapshot = self.pool.snapshot();
        let figures = figures::figures(&snapshot, models);
        (snapshot, figures)
    }
}

impl Host {
    fn find(&self, model: &str) -> core::result::Result<&Hosted, Refusal> {
        let found = self.models.iter().find(|it| it.info().id == model);
        found.ok_or(Refusal::UnknownModel)
    }
}

impl Backend for Host {
    fn models(&self) -> Vec<ModelInfo> {
        let models = self.models.iter().map(|it| ModelInfo {
            is_asleep: it.work().rest.is_asleep,
            ..it.info().clone()
        });
        models.collect()
    }

    fn submit(
        &self,
        model: &str,
        ask: Generate,
    ) -> core::result::Result<mpsc::Receiver<Event>, Refusal> {
        self.find(model)?.submit(ask)
    }

    fn sleep(&self, model: &str) -> core::result::Result<Ended, Refusal> {
        self.find(model)?.tell(Command::Sleep)
    }

    fn wake(&self, model: &str) -> core::result::Result<Ended, Refusal> {
        self.find(model)?.tell(Command::Wake)
    }

    fn figures(&self) -> Figures {
        self.look().1
    }

    fn metrics(&self) -> String {
        let (snapshot, figures) = self.look();
        let mut text = snapshot.prometheus();
        metrics::write_metrics(&self.models, &mut text);
        if self.sleeps {
            metrics::write_sleeps(&self.models, &mut text);
        }
        figures::write_metrics(&figures, &mut text);
        text
    }

    fn is_healthy(&self) -> bool {
        self.models.iter().all(Hosted::is_healthy)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.close();
    }
}

/// Waits until a model is made.
fn await_start(started: &Receiver<Result<()>>) -> Result<()> {
    let ended = |_| candle_core::Error::msg("the model's thread has ended");
    started.recv().map_err(ended)?
}

/// The error of a thread that could not be started.
fn no_thread(error: std::io::Error) -> VmmError {
    candle_core::Error::wrap(error).into()
}
