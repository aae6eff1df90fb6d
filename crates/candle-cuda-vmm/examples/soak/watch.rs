//! What is looked at while the threads play, and when they have ended.

use candle_cuda_vmm::cuda_vmm::sys::{
    CUDA_ERROR_OPERATING_SYSTEM, CUDA_ERROR_OUT_OF_MEMORY, CUresult,
};
use candle_cuda_vmm::cuda_vmm::{Device, MemoryParts, SharedMemoryPool};
#[cfg(feature = "simulator")]
use candle_cuda_vmm::sim::{Fault, Simulator};
use candle_cuda_vmm::{Result, VmmError};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::thread;
use std::time::{Duration, Instant};

/// The codes with which calls fail.
pub const CODES: [CUresult; 2] = [CUDA_ERROR_OPERATING_SYSTEM, CUDA_ERROR_OUT_OF_MEMORY];

/// Calls of the simulated driver that are made to fail.
pub struct Faults {
    #[cfg(feature = "simulator")]
    simulator: Simulator,
}

impl Faults {
    /// `None` if the driver is a real one.
    pub fn of(device: &Device) -> Option<Self> {
        #[cfg(feature = "simulator")]
        return device
            .driver()
            .simulator()
            .cloned()
            .map(|simulator| Self { simulator });
        #[cfg(not(feature = "simulator"))]
        return None;
    }

    /// One of the next calls of any thread fails.
    fn plan(&self, random: &mut SmallRng) {
        let code = CODES[random.random_range(0..CODES.len())];
        let nth = random.random_range(1..50);
        #[cfg(feature = "simulator")]
        self.simulator.inject(Fault::nth_call(nth, code));
    }

    pub fn clear(&self) {
        #[cfg(feature = "simulator")]
        self.simulator.clear_faults();
    }
}

/// Looks at the memory of the pool and of this process.
pub struct Watch<'a> {
    shared: &'a SharedMemoryPool,
    faults: Option<&'a Faults>,
    random: SmallRng,
    looks: u64,
    most: MemoryParts,
    /// Of this process, in bytes, once a second.
    resident_bytes: Vec<usize>,
}

impl<'a> Watch<'a> {
    pub fn new(shared: &'a SharedMemoryPool, faults: Option<&'a Faults>, seed: u64) -> Self {
        Self {
            shared,
            faults,
            random: SmallRng::seed_from_u64(seed),
            looks: 0,
            most: MemoryParts::default(),
            resident_bytes: Vec::new(),
        }
    }

    /// Looks for so long, or until all is over.
    ///
    /// # Errors
    /// If the parts do not add up, or more is held than allowed.
    pub fn run(&mut self, duration: Duration, is_over: impl Fn() -> bool) -> Result<()> {
        let (started, mut sampled) = (Instant::now(), None);
        while started.elapsed() < duration && !is_over() {
            self.look()?;
            if let Some(faults) = self.faults {
                faults.plan(&mut self.random);
            }
            let second = started.elapsed().as_secs();
            if sampled != Some(second) {
                sampled = Some(second);
                self.resident_bytes.push(resident_bytes());
                if second % 60 == 0 {
                    println!("minute {}: {}", second / 60, self.shared.stats());
                }
            }
            thread::sleep(Duration::from_millis(10));
        }
        self.expect_flat()
    }

    fn look(&mut self) -> Result<()> {
        let snapshot = self.shared.snapshot();
        let engine = snapshot.engine;
        let held: MemoryParts = snapshot.accounts.iter().map(|it| it.stats.parts).sum();
        let is_sum = held + snapshot.others == engine.parts
            && engine.parts.total_bytes() == engine.committed_bytes;
        let mut accounts = snapshot.accounts.iter().map(|it| it.stats);
        let are_sums = accounts.all(|it| it.parts.total_bytes() == it.committed_bytes);
        if !is_sum || !are_sums {
            return Err(VmmError::other(format!(
                "the parts do not add up: {snapshot:?}"
            )));
        }
        if engine.committed_bytes > engine.limit_bytes {
            return Err(VmmError::other(format!("more than the limit: {engine}")));
        }
        self.looks += 1;
        if engine.committed_bytes > self.most.total_bytes() {
            self.most = engine.parts;
        }
        Ok(())
    }

    /// Fails if the process grows: in the last quarter of the time it may hold a twentieth and
    /// 16 MiB more than in the second. Shorter runs than two minutes are not judged.
    fn expect_flat(&self) -> Result<()> {
        let count = self.resident_bytes.len();
        let median = |quarter: usize| {
            let mut part =
                self.resident_bytes[quarter * count / 4..(quarter + 1) * count / 4].to_vec();
            part.sort_unstable();
            part.get(part.len() / 2).copied().unwrap_or_default()
        };
        let (before, after) = (median(1), median(3));
        println!("resident memory: {before} bytes in the second quarter, {after} in the last");
        match count >= 120 && after > before + before / 20 + (16 << 20) {
            true => Err(VmmError::other(format!(
                "the process grew from {before} to {after} bytes"
            ))),
            false => Ok(()),
        }
    }

    pub fn report(&self) {
        println!("{} looks; at the most: {}", self.looks, self.most);
    }
}

/// Memory of this process, in bytes.
fn resident_bytes() -> usize {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<usize>().ok());
    kib.unwrap_or_default() << 10
}

/// Fails unless all memory goes back to the driver.
pub fn expect_all_given_back(device: &Device, shared: &SharedMemoryPool) -> Result<()> {
    device.synchronize()?;
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        shared.trim()?;
        device.retry_quarantine();
        let stats = shared.stats();
        if stats.committed_bytes == 0 && stats.ranges == 0 {
            return Ok(());
        }
        if Instant::now() > until {
            return Err(VmmError::other(format!("left in the end: {stats}")));
        }
        thread::sleep(Duration::from_millis(10));
    }
}
