//! The device on which everything is measured.

use anyhow::Result;
use candle_core::{DType, Device};
use candle_cuda_vmm::device::core_device;
use candle_cuda_vmm::{TensorPool, TensorPoolOptions};
use clap::ValueEnum;
use cuda_vmm_benches::{Settings, time};
use std::hint::black_box;
use std::time::Duration;

/// Of keys and values.
pub const KV_HEADS: usize = 8;
pub const HEAD_DIM: usize = 128;
pub const DTYPE: DType = DType::F16;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Place {
    /// GPU 0; without it nothing is measured.
    Cuda,
    /// Host memory: every measurement runs, small, but times mean nothing and are not judged.
    Cpu,
}

/// A device with nothing else to do.
pub struct Machine {
    pub candle: Device,
    /// The same; where that is a CPU, the simulated one behind it.
    pub device: cuda_vmm::Device,
    pub settings: Settings,
    /// Whether all is small, which shows in seconds that everything runs.
    is_small: bool,
}

impl Machine {
    /// Opens what is asked for, and nothing else.
    pub fn open(place: Place, quick: bool) -> Result<Self> {
        let candle = match place {
            Place::Cuda => Device::new_cuda(0)?,
            Place::Cpu => Device::Cpu,
        };
        let is_small = quick || candle.is_cpu();
        let (rounds, seconds) = if is_small { (3, 1) } else { (200, 10) };
        Ok(Self {
            device: core_device(&candle)?,
            settings: Settings::new(rounds, seconds),
            is_small,
            candle,
        })
    }

    /// Whether times mean something here.
    pub fn is_real(&self) -> bool {
        self.candle.is_cuda() && !self.is_small
    }

    /// The size of the figures, or the one that only shows that everything runs.
    pub fn sized<T: Copy>(&self, [full, small]: [T; 2]) -> T {
        if self.is_small { small } else { full }
    }

    /// A pool for tensors and caches that grow, whose caches perhaps copy what they return.
    pub fn pool(&self, is_contiguous: bool) -> Result<TensorPool> {
        let options = self.pool_options(is_contiguous);
        Ok(TensorPool::with_options(&self.candle, options)?)
    }

    pub fn pool_options(&self, is_contiguous: bool) -> TensorPoolOptions {
        // Two pages ahead of each tensor's end, so that no token waits for the driver.
        let options = TensorPoolOptions::new().ahead_bytes_max(4 << 20);
        options.contiguous_output(is_contiguous)
    }

    /// The mean time of doing something this many times, until the device is done with all of it.
    pub fn mean_time<T>(
        &self,
        count: usize,
        mut act: impl FnMut() -> candle_core::Result<T>,
    ) -> Result<Duration> {
        self.candle.synchronize()?;
        let ((), elapsed) = time(|| {
            (0..count).try_for_each(|_| act().map(|made| drop(black_box(made))))?;
            self.candle.synchronize()
        })?;
        Ok(elapsed / count as u32)
    }
}
