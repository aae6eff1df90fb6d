//! The driver and the device on which everything is measured.

use crate::arguments::{Arguments, Choice, Replay};
use crate::{bare, recorder};
use anyhow::{Result, ensure};
use cuda_vmm::{
    Device, Driver, DriverKind, Engine, EngineOptions, EngineStats, PoolOptions, Stream,
    VirtualMemoryPool,
};
use cuda_vmm_benches::{Filling, Settings, program};
use cuda_vmm_sim::{SimConfig, Simulator};
use std::time::{Duration, Instant};

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
    pub replay: Replay,
    /// Fills a pool on a driver that does nothing, and counts the host memory that the process
    /// holds for it.
    pub fillings: fn() -> Result<[Filling; 4]>,
    /// Behind the tables of the drivers above, so that it must go last.
    _simulator: Option<Simulator>,
}

impl program::Machine for Machine {
    fn device(&self) -> &Device {
        &self.device
    }

    fn is_real(&self) -> bool {
        self.device.driver().kind() == DriverKind::Real
    }
}

impl Machine {
    /// Opens the driver that is asked for, and no other.
    pub fn open(arguments: &Arguments, fillings: fn() -> Result<[Filling; 4]>) -> Result<Self> {
        let (driver, simulator) = match arguments.driver {
            Choice::Real => (Driver::cuda()?, None),
            Choice::Simulated => {
                let simulator = Simulator::new(SimConfig::new())?;
                let (table, kind) = (simulator.table(), DriverKind::Simulated);
                // SAFETY: the simulator is kept in the machine, behind all that is made of its
                // table.
                (unsafe { Driver::from_table(table, kind) }?, Some(simulator))
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
            settings: arguments.settings(),
            replay: arguments.replay,
            fillings,
            _simulator: simulator,
        })
    }

    /// The wanted bytes, or as much less as the device's memory allows: at most a share of what is
    /// free, in whole units.
    pub fn fitting(&self, wanted_bytes: usize, share: f64, unit_bytes: usize) -> Result<usize> {
        let most = (self.device.free_bytes()? as f64 * share) as usize;
        let bytes = wanted_bytes.min(most) / unit_bytes * unit_bytes;
        ensure!(bytes > 0, "the device has too little memory for this");
        Ok(bytes)
    }

    /// A pool on an engine of its own, whose memory is used on the machine's stream.
    pub fn pool(&self, engine: EngineOptions, capacity_bytes: usize) -> Result<VirtualMemoryPool> {
        let engine = Engine::new(&self.device, engine)?;
        self.range(&engine, capacity_bytes, PoolOptions::new())
    }

    /// A pool on an engine, whose memory is used on the machine's stream.
    pub fn range(
        &self,
        engine: &Engine,
        capacity_bytes: usize,
        options: PoolOptions,
    ) -> Result<VirtualMemoryPool> {
        let (bytes, page_bytes) = (capacity_bytes, self.page_bytes);
        let pool = VirtualMemoryPool::with_options(engine, bytes, page_bytes, options)?;
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

/// Looks at an engine's numbers until they are as they should be, and leaves the steps to its
/// thread.
pub fn watch(engine: &Engine, what: &str, is_so: impl Fn(&EngineStats) -> bool) -> Result<()> {
    let started = Instant::now();
    while !is_so(&engine.stats()) {
        ensure!(started.elapsed() < PATIENCE, "waited in vain for {what}");
        std::hint::spin_loop();
    }
    Ok(())
}
