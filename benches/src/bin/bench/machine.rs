//! The driver and the device on which everything is measured.

use crate::arguments::Choice;
use crate::work::ReplaySettings;
use crate::{bare, recorder};
use anyhow::{Context, Result, ensure};
use cuda_vmm::{
    Device, Driver, DriverKind, Engine, EngineOptions, EngineStats, Stream, VirtualMemoryPool,
};
use cuda_vmm_sim::{SimConfig, Simulator};
use std::time::{Duration, Instant};

/// How long each piece of work is measured.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How many rounds work gets that takes some milliseconds.
    pub rounds: usize,
    /// The fewest rounds, however long they take.
    pub rounds_min: usize,
    /// The time after which no further round of one piece of work begins.
    pub patience: Duration,
}

impl Settings {
    /// With so many times the time, for work whose rounds are long and whose figure is near its reach.
    pub fn patient(&self, times: u32) -> Self {
        Self {
            patience: self.patience * times,
            ..*self
        }
    }
}

/// A device with nothing else to do.
pub struct Machine {
    /// The device, with its context current on this thread.
    pub device: Device,
    /// The same device, whose driver's calls can be recorded.
    pub recorded: Device,
    /// A stream of the device.
    pub stream: Stream,
    /// The page of all pools in bytes: the device's granularity.
    pub page_bytes: usize,
    /// How long each piece of work is measured.
    pub settings: Settings,
    /// How the replay of a server's work is made.
    pub replay: ReplaySettings,
    /// Behind the tables of the drivers above, so that it must go last.
    _simulator: Option<Simulator>,
}

impl Machine {
    /// Opens the driver that is asked for, and no other.
    pub fn open(choice: Choice, settings: Settings, replay: ReplaySettings) -> Result<Self> {
        let simulator = match choice {
            Choice::Real => None,
            Choice::Simulated => Some(Simulator::new(SimConfig::new())?),
        };
        let driver = match &simulator {
            None => Driver::cuda()?,
            Some(simulator) => {
                let table = simulator.table();
                // SAFETY: the simulator is kept in the machine, behind all that is made of its table.
                unsafe { Driver::from_table(table, DriverKind::Simulated) }?
            }
        };
        ensure!(driver.device_count()? > 0, "the driver has no device");
        let device = driver.device(0)?;
        bare::make_current(&device)?;
        Ok(Self {
            recorded: recorder::open(&driver)?.device(0)?,
            stream: Stream::new(&device)?,
            page_bytes: device.granularity_bytes(),
            device,
            settings,
            replay,
            _simulator: simulator,
        })
    }

    /// Whether times mean something here.
    pub fn is_real(&self) -> bool {
        self.device.driver().kind() == DriverKind::Real
    }

    /// The wanted bytes, or as much less as the device's memory allows: at most a share of what is free, in whole
    /// units.
    pub fn fitting(&self, wanted_bytes: usize, share: f64, unit_bytes: usize) -> Result<usize> {
        let most = (self.device.free_bytes()? as f64 * share) as usize;
        let bytes = wanted_bytes.min(most) / unit_bytes * unit_bytes;
        ensure!(bytes > 0, "the device has too little memory for this");
        Ok(bytes)
    }

    /// A pool on an engine of its own, whose memory is used on the machine's stream.
    pub fn pool(&self, options: EngineOptions, capacity_bytes: usize) -> Result<VirtualMemoryPool> {
        let engine = Engine::new(&self.device, options)?;
        let pool = VirtualMemoryPool::on_engine(&engine, capacity_bytes, self.page_bytes)?;
        pool.use_stream(&self.stream)?;
        Ok(pool)
    }

    /// Waits for the stream, and then until the engine holds nothing that is not live.
    pub fn give_back(&self, engine: &Engine) -> Result<()> {
        self.stream.synchronize()?;
        until(engine, "memory to go back", |stats| {
            engine.trim()?;
            Ok(stats.committed_bytes == stats.parts.live_page_bytes + stats.parts.slack_bytes)
        })
    }
}

/// The engine's options for whatever is not about one of them.
pub fn options() -> EngineOptions {
    EngineOptions::new()
}

/// For how long something may be waited for.
const PATIENCE: Duration = Duration::from_secs(10);

/// Takes steps of an engine until its numbers are as they should be.
pub fn until(
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

/// Looks at an engine's numbers until they are as they should be, and leaves the steps to its thread.
pub fn watch(engine: &Engine, what: &str, is_so: impl Fn(&EngineStats) -> bool) -> Result<()> {
    let started = Instant::now();
    while !is_so(&engine.stats()) {
        ensure!(started.elapsed() < PATIENCE, "waited in vain for {what}");
        std::hint::spin_loop();
    }
    Ok(())
}

/// The time that something takes which can fail.
pub fn time<T, E>(act: impl FnOnce() -> Result<T, E>) -> Result<(T, Duration)>
where
    E: Into<anyhow::Error>,
{
    let started = Instant::now();
    let outcome = act();
    let elapsed = started.elapsed();
    Ok((
        outcome.map_err(Into::into).context("while it was timed")?,
        elapsed,
    ))
}
