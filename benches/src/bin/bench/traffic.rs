//! Memory traffic on a stream that stands for a model's compute: a kernel that writes
//! bytes as fast as the memory takes them.

use crate::bare::Plain;
use crate::kernel::{launch, load};
use crate::machine::Machine;
use anyhow::{Result, ensure};
use cuda_vmm::sys::CUfunction;
use cuda_vmm::{Device, Stream};
use std::ffi::c_void;
use std::time::{Duration, Instant};

const VECTOR_BYTES: usize = 16;
/// As many as keep all of a large GPU's memory busy.
const BLOCKS: u32 = 1056;
const THREADS: u32 = 256;
/// Larger than what caches hold.
const BUFFER_BYTES: usize = 1 << 30;
/// How much is written to find out how fast that is.
const TRIAL_BYTES: usize = 8 << 30;
/// What is written in the simulator in place of more: it is there to run, not to take time.
const SIMULATED_BYTES: usize = 4096;

/// The kernel, and memory of its own to write to.
pub struct Traffic<'a> {
    kernel: Option<CUfunction>,
    buffer: Plain<'a>,
    buffer_bytes: usize,
    bytes_per_second: f64,
}

impl<'a> Traffic<'a> {
    /// Loads the kernel and finds out how fast it writes, on this stream.
    pub fn new(machine: &Machine, device: &'a Device, stream: &Stream) -> Result<Self> {
        let kernel = load(device, include_str!("traffic.ptx"), c"traffic")?;
        let buffer_bytes = match kernel {
            Some(_) => BUFFER_BYTES.min(machine.fitting(BUFFER_BYTES, 0.05, 1 << 20)?),
            None => SIMULATED_BYTES,
        };
        // A power of two, for the kernel goes round by a mask.
        let buffer_bytes = 1 << buffer_bytes.ilog2();
        let mut traffic = Self {
            kernel,
            buffer: Plain::new(device, buffer_bytes)?,
            buffer_bytes,
            bytes_per_second: f64::INFINITY,
        };
        if traffic.kernel.is_some() {
            traffic.bytes_per_second = traffic.trial(stream)?;
        }
        Ok(traffic)
    }

    /// The best of a few tries, the first of which warms up.
    fn trial(&self, stream: &Stream) -> Result<f64> {
        let mut best = Duration::MAX;
        for _ in 0..4 {
            let started = Instant::now();
            self.queue(stream, TRIAL_BYTES)?;
            stream.synchronize()?;
            best = best.min(started.elapsed());
        }
        ensure!(!best.is_zero(), "memory traffic took no time");
        Ok(TRIAL_BYTES as f64 / best.as_secs_f64())
    }

    /// How fast it writes; nothing in the simulator.
    pub fn bytes_per_second(&self) -> Option<f64> {
        self.kernel.map(|_| self.bytes_per_second)
    }

    /// Queues bytes of traffic in memory of its own.
    pub fn queue(&self, stream: &Stream, bytes: usize) -> Result<()> {
        // SAFETY: the memory is ours while this lives, which is beyond the stream's work: the owner
        // has synchronised before it drops this, and `cuMemFree` waits besides.
        unsafe { self.write(stream, self.buffer.address(), self.buffer_bytes, bytes) }
    }

    /// Queues as much traffic as takes this long.
    pub fn queue_for(&self, stream: &Stream, time: Duration) -> Result<()> {
        match self.bytes_per_second() {
            Some(rate) => self.queue(stream, (rate * time.as_secs_f64()) as usize),
            None => self.queue(stream, SIMULATED_BYTES),
        }
    }

    /// Queues a write of a power of two of bytes.
    ///
    /// # Safety
    /// The bytes are live until the stream is past this.
    pub unsafe fn touch(&self, stream: &Stream, target: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.write(stream, target, bytes, bytes) }
    }

    /// # Safety
    /// The `room_bytes` bytes from `target` on, a power of two, are live until the stream is past
    /// this.
    unsafe fn write(
        &self,
        stream: &Stream,
        mut target: u64,
        room_bytes: usize,
        bytes: usize,
    ) -> Result<()> {
        let Some(kernel) = self.kernel else {
            let bytes = bytes.min(room_bytes).min(SIMULATED_BYTES);
            // SAFETY: the caller's promise.
            return Ok(unsafe { stream.memset(target, 1, bytes) }?);
        };
        let mut mask = (room_bytes / VECTOR_BYTES - 1) as u64;
        let mut vectors = (bytes / VECTOR_BYTES) as u64;
        let mut parameters: [*mut c_void; 3] = [
            (&raw mut target).cast(),
            (&raw mut mask).cast(),
            (&raw mut vectors).cast(),
        ];
        // No more than there is work for.
        let blocks = vectors.div_ceil(u64::from(THREADS)).clamp(1, BLOCKS.into()) as u32;
        // SAFETY: the parameters are those that the kernel declares; it writes within the caller's
        // memory, as the mask has it begin again at its end.
        unsafe { launch(kernel, stream, (blocks, THREADS), &mut parameters) }
    }
}
