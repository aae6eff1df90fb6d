//! All use of `cuda-vmm`: the GPU, and the pool that the models share.

use anyhow::{Context, Result, ensure};
use cuda_vmm::{
    Device, Driver, DriverKind, PoolOptions, Quota, SharedMemoryPool, VirtualMemoryPool,
};
use serde::Serialize;

use crate::replay::{Answer, KvMemory, Place};
use crate::workload::Workload;

/// The part of a device's free memory that the pool may take, in hundredths.
const FREE_PERCENT_MAX: u64 = 90;

/// The device that the demo runs on.
#[derive(Clone, Debug)]
pub struct Gpu {
    driver: Driver,
    device: Device,
}

/// What the demo runs on, as data.
#[derive(Clone, Debug, Serialize)]
pub struct GpuFigures {
    /// `real` or `simulated`.
    pub driver: &'static str,
    /// Version of the CUDA driver interface.
    pub driver_version: String,
    /// Name of the device.
    pub device: String,
    /// Memory of the device.
    pub device_bytes: u64,
    /// Size of a page.
    pub page_bytes: u64,
}

impl Gpu {
    /// A real GPU if one answers, otherwise the simulator.
    pub fn detect() -> Result<Self> {
        let driver = Driver::detect().context("no driver")?;
        let device = driver.device(0).context("cannot use device 0")?;
        Ok(Self { driver, device })
    }

    /// What it is.
    pub fn figures(&self) -> GpuFigures {
        GpuFigures {
            driver: match self.driver.kind() {
                DriverKind::Real => "real",
                DriverKind::Simulated => "simulated",
            },
            driver_version: self.driver.version().to_string(),
            device: self.device.name().to_owned(),
            device_bytes: self.device.total_bytes() as u64,
            page_bytes: self.device.granularity_bytes() as u64,
        }
    }

    /// The most that the pool should take of this device now, in whole pages.
    pub fn room_bytes(&self) -> Result<u64> {
        let free_bytes = self
            .device
            .free_bytes()
            .context("cannot ask for free memory")? as u64;
        let page_bytes = self.device.granularity_bytes() as u64;
        Ok(free_bytes / 100 * FREE_PERCENT_MAX / page_bytes * page_bytes)
    }
}

/// A `SharedMemoryPool` in which each model has a range of addresses, cut into slots for requests.
pub struct ElasticPool {
    pool: SharedMemoryPool,
    ranges: Vec<Range>,
}

struct Range {
    model: &'static str,
    pool: VirtualMemoryPool,
    bytes_per_token: usize,
    slot_bytes: usize,
    page_bytes: usize,
    peak_committed_bytes: u64,
}

impl ElasticPool {
    /// A pool of `limit_bytes` of physical memory in which the workload's models are registered.
    /// Each range has room for as many requests as can run at once, each as long as the longest.
    pub fn new(gpu: &Gpu, workload: &Workload, limit_bytes: u64) -> Result<Self> {
        let limit = usize::try_from(limit_bytes)?;
        let pool = SharedMemoryPool::new(&gpu.device, limit).context("cannot make the pool")?;
        let page_bytes = gpu.device.granularity_bytes();
        let mut ranges = Vec::with_capacity(workload.services.len());
        for service in &workload.services {
            let model = service.model.name;
            // A running request holds a page at least, and one more may be asking.
            let slots = service.running_max().min(limit / page_bytes + 1).max(1);
            let request_bytes = usize::try_from(service.model.bytes(service.tokens_max()))?;
            let slot_bytes = request_bytes.max(1).next_multiple_of(page_bytes);
            let capacity_bytes = slot_bytes.checked_mul(slots).with_context(|| {
                format!("{model}: {slots} requests of {slot_bytes} bytes are too many")
            })?;
            let account = pool
                .register_model(model, Quota::new())
                .with_context(|| format!("cannot register {model}"))?;
            let options = PoolOptions::new();
            let range =
                VirtualMemoryPool::on_account(&account, capacity_bytes, page_bytes, options)
                    .with_context(|| {
                        format!("cannot reserve {capacity_bytes} bytes of addresses for {model}")
                    })?;
            ranges.push(Range {
                model,
                pool: range,
                bytes_per_token: usize::try_from(service.model.bytes_per_token)?,
                slot_bytes,
                page_bytes,
                peak_committed_bytes: 0,
            });
        }
        Ok(Self { pool, ranges })
    }

    /// Physical memory that the pool holds, in bytes.
    pub fn committed_bytes(&self) -> u64 {
        self.pool.stats().committed_bytes as u64
    }

    /// The most physical memory that each model held, in bytes.
    pub fn peaks_committed_bytes(&self) -> Vec<u64> {
        self.ranges
            .iter()
            .map(|range| range.peak_committed_bytes)
            .collect()
    }

    /// Unregisters all models and gives all memory back to the device, which must leave nothing.
    pub fn close(self) -> Result<()> {
        for range in self.ranges {
            let model = range.model;
            self.pool
                .unregister_model(model)
                .with_context(|| format!("cannot unregister {model}"))?;
            let closed = range.pool.close();
            closed.with_context(|| format!("cannot give back what {model} holds"))?;
        }
        self.pool.trim().context("cannot trim the pool")?;
        let committed_bytes = self.pool.stats().committed_bytes;
        ensure!(
            committed_bytes == 0,
            "the pool still holds {committed_bytes} bytes after every model has gone"
        );
        Ok(())
    }
}

impl KvMemory for ElasticPool {
    fn grow(&mut self, place: Place, held_tokens: u32, tokens: u32) -> Result<Answer> {
        let range = &self.ranges[place.model];
        let held_bytes = held_tokens as usize * range.bytes_per_token;
        let bytes = tokens as usize * range.bytes_per_token;
        let offset = place.slot * range.slot_bytes + held_bytes;
        match range.pool.allocate(offset, bytes) {
            Ok(_) => {}
            Err(error) if error.is_out_of_memory() => return Ok(Answer::Refused),
            Err(error) => {
                return Err(error).with_context(|| format!("{} cannot allocate", range.model));
            }
        }
        let pages = |bytes: usize| bytes.div_ceil(range.page_bytes);
        if pages(held_bytes + bytes) > pages(held_bytes) {
            let committed_bytes = range.pool.stats().committed_bytes as u64;
            let range = &mut self.ranges[place.model];
            range.peak_committed_bytes = range.peak_committed_bytes.max(committed_bytes);
        }
        Ok(Answer::Granted)
    }

    fn give_back(&mut self, place: Place, tokens: u32) -> Result<()> {
        let range = &self.ranges[place.model];
        let bytes = tokens as usize * range.bytes_per_token;
        let offset = place.slot * range.slot_bytes;
        let freed = range.pool.deallocate(offset, bytes);
        freed.with_context(|| format!("{} cannot give back {bytes} bytes at {offset}", range.model))
    }
}
