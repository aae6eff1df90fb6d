//! The driver and the device on which everything is measured.

use crate::bare::call;
use crate::{Arguments, Choice, Replay};
use anyhow::{Result, ensure};
use cuda_vmm::{Device, Driver, DriverKind, Engine, EngineOptions};
use cuda_vmm::{PoolOptions, Stream, VirtualMemoryPool};
use cuda_vmm_benches::{Settings, noting_driver, step_until};
use cuda_vmm_sim::SimConfig;

/// A device with nothing else to do.
pub struct Machine {
    /// A stream of the same device, of a driver whose calls can be noted.
    pub noted: Stream,
    pub stream: Stream,
    /// The page of all pools in bytes: the device's granularity.
    pub page_bytes: usize,
    pub settings: Settings,
    pub replay: Replay,
    /// The device, current on this thread. It is last, as its driver is behind the noting one.
    pub device: Device,
}

impl Machine {
    /// Opens the driver that is asked for, and no other.
    pub fn open(arguments: &Arguments) -> Result<Self> {
        let driver = match arguments.driver {
            Choice::Real => Driver::cuda()?,
            Choice::Simulated => Driver::simulated(SimConfig::new())?,
        };
        ensure!(driver.device_count()? > 0, "the driver has no device");
        let device = driver.device(0)?;
        // For good, as programs have it that use the CUDA runtime.
        // SAFETY: the context is retained while the device lives, which is as long as the program.
        unsafe { call!(device, cuCtxSetCurrent(device.raw_context())) }?;
        Ok(Self {
            noted: Stream::new(&noting_driver(&driver)?.device(0)?)?,
            stream: Stream::new(&device)?,
            page_bytes: device.granularity_bytes(),
            settings: arguments.settings(),
            replay: arguments.replay,
            device,
        })
    }

    /// Whether times mean something here.
    pub fn is_real(&self) -> bool {
        self.device.driver().kind() == DriverKind::Real
    }

    /// At most the wanted bytes and this share of what is free, in whole units.
    pub fn fitting(&self, wanted_bytes: usize, share: f64, unit_bytes: usize) -> Result<usize> {
        let most = (self.device.free_bytes()? as f64 * share) as usize;
        let bytes = wanted_bytes.min(most) / unit_bytes * unit_bytes;
        ensure!(bytes > 0, "the device has too little memory for this");
        Ok(bytes)
    }

    /// A pool on an engine of its own, whose memory is used on the machine's stream.
    pub fn pool(&self, engine: EngineOptions, capacity_bytes: usize) -> Result<VirtualMemoryPool> {
        let engine = Engine::new(&self.device, engine)?;
        range(&engine, capacity_bytes, PoolOptions::new(), &self.stream)
    }

    /// Waits for the stream, and then until the engine holds nothing that is not live.
    pub fn give_back(&self, engine: &Engine) -> Result<()> {
        self.stream.synchronize()?;
        step_until(engine, "memory to go back", |stats| {
            engine.trim()?;
            Ok(stats.committed_bytes == stats.parts.live_page_bytes + stats.parts.slack_bytes)
        })
    }
}

/// A pool on an engine, whose memory is used on a stream.
pub fn range(
    engine: &Engine,
    capacity_bytes: usize,
    options: PoolOptions,
    stream: &Stream,
) -> Result<VirtualMemoryPool> {
    let page_bytes = stream.device().granularity_bytes();
    let pool = VirtualMemoryPool::with_options(engine, capacity_bytes, page_bytes, options)?;
    pool.use_stream(stream)?;
    Ok(pool)
}
