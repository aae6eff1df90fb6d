//! The device on which everything is measured.

use crate::arguments::{Arguments, Place};
use crate::sizes::Sizes;
use anyhow::Result;
use candle_core::Device;
use candle_cuda_vmm::device::core_device;
use candle_cuda_vmm::{TensorPool, TensorPoolOptions};
use std::time::Duration;

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
    /// With all rounds, however long they take.
    pub fn whole(&self) -> Self {
        Self {
            patience: Duration::MAX,
            ..*self
        }
    }
}

/// A device with nothing else to do.
pub struct Machine {
    /// Candle's.
    pub candle: Device,
    /// The same; where that is a CPU, the simulated one behind it.
    pub device: cuda_vmm::Device,
    /// How long each piece of work is measured.
    pub settings: Settings,
    /// How large everything is.
    pub sizes: Sizes,
    is_real: bool,
}

/// What is made ahead of each tensor's end, in bytes: two pages, so that no token waits for the driver.
const AHEAD_BYTES: usize = 4 << 20;

impl Machine {
    /// Opens what is asked for, and nothing else.
    pub fn open(arguments: &Arguments) -> Result<Self> {
        let candle = match arguments.device {
            Place::Cuda => Device::new_cuda(0)?,
            Place::Cpu => Device::Cpu,
        };
        let is_small = arguments.quick || candle.is_cpu();
        let (rounds, seconds) = if is_small { (3, 1) } else { (200, 10) };
        Ok(Self {
            device: core_device(&candle)?,
            settings: Settings {
                rounds,
                rounds_min: 3,
                patience: Duration::from_secs(seconds),
            },
            sizes: if is_small { Sizes::SMALL } else { Sizes::FULL },
            is_real: candle.is_cuda() && !is_small,
            candle,
        })
    }

    /// Whether times mean something here.
    pub fn is_real(&self) -> bool {
        self.is_real
    }

    /// How pools for tensors and caches that grow are made.
    pub fn pool_options(&self) -> TensorPoolOptions {
        TensorPoolOptions::new().ahead_bytes_max(AHEAD_BYTES)
    }

    /// A pool for tensors and caches that grow.
    pub fn pool(&self) -> Result<TensorPool> {
        let options = self.pool_options();
        Ok(TensorPool::with_options(&self.candle, options)?)
    }

    /// Waits for everything that is queued.
    pub fn synchronize(&self) -> Result<()> {
        Ok(self.candle.synchronize()?)
    }
}
