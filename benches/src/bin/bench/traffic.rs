//! Work for a stream: a kernel that writes bytes as fast as it can, in place of a model's work.
//!
//! A memset would look its addresses up when it is called, and so wait while another thread maps.

use crate::bare::{Plain, call, check};
use crate::machine::Machine;
use anyhow::{Result, ensure};
use cuda_vmm::sys::{CUfunction, CUmodule, DriverFunction};
use cuda_vmm::{Device, DriverKind, Stream};
use std::ffi::{CString, c_void};
use std::ptr::null_mut;
use std::time::{Duration, Instant};

/// Generated from the `.cu` beside it; `cargo xtask test --cuda` keeps the two in step.
const PTX: &str = include_str!("traffic.ptx");
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

/// The kernel, loaded for the process's life. In the simulator a memset stands for it.
#[derive(Clone, Copy)]
pub struct Kernel(Option<CUfunction>);

impl Kernel {
    /// Loads it on a device whose context is current on this thread.
    pub fn load(device: &Device) -> Result<Self> {
        if device.driver().kind() == DriverKind::Simulated {
            return Ok(Self(None));
        }
        let image = CString::new(PTX)?;
        let (mut module, mut function): (CUmodule, _) = (null_mut(), null_mut());
        let (name, image) = (c"traffic".as_ptr(), image.as_ptr().cast());
        // SAFETY: the image is PTX that ends with a zero, and both places are valid.
        unsafe {
            call!(device, cuModuleLoadData(&mut module, image))?;
            call!(device, cuModuleGetFunction(&mut function, module, name))?;
        }
        Ok(Self(Some(function)))
    }

    /// Queues a write of so many bytes that begins again after `room_bytes`, a power of two.
    ///
    /// # Safety
    /// The `room_bytes` bytes from `target` on are live until the stream is past this.
    pub unsafe fn write(
        self,
        stream: &Stream,
        mut target: u64,
        room_bytes: usize,
        bytes: usize,
    ) -> Result<()> {
        let Some(kernel) = self.0 else {
            let bytes = bytes.min(room_bytes).min(SIMULATED_BYTES);
            // SAFETY: the caller's promise.
            return Ok(unsafe { stream.memset(target, 1, bytes) }?);
        };
        let mut mask = (room_bytes / VECTOR_BYTES - 1) as u64;
        let mut vectors = (bytes / VECTOR_BYTES) as u64;
        // No more than there is work for.
        let blocks = vectors.div_ceil(THREADS.into()).clamp(1, BLOCKS.into()) as u32;
        let mut parameters: [*mut c_void; 3] = [
            (&raw mut target).cast(),
            (&raw mut mask).cast(),
            (&raw mut vectors).cast(),
        ];
        let (values, queue, none) = (parameters.as_mut_ptr(), stream.raw(), null_mut());
        let launch = stream.device().driver().table().cuLaunchKernel;
        // SAFETY: the parameters are those that the kernel declares, and are read before the call
        // returns; it writes within the caller's memory, as the mask has it begin again at its end.
        let code = unsafe { launch(kernel, blocks, 1, 1, THREADS, 1, 1, 0, queue, values, none) };
        check(code, DriverFunction::cuLaunchKernel)
    }
}

pub struct Traffic {
    pub kernel: Kernel,
    pub stream: Stream,
    buffer: Plain,
    buffer_bytes: usize,
    /// How fast it writes; infinitely in the simulator.
    pub bytes_per_second: f64,
}

impl Traffic {
    /// Loads the kernel and finds out how fast it writes, on this stream.
    pub fn new(machine: &Machine, stream: &Stream) -> Result<Self> {
        let kernel = Kernel::load(stream.device())?;
        let buffer_bytes = match kernel.0 {
            Some(_) => machine.fitting(BUFFER_BYTES, 0.05, 1 << 20)?,
            None => SIMULATED_BYTES,
        };
        // A power of two, for the kernel goes round by a mask.
        let buffer_bytes = 1 << buffer_bytes.ilog2();
        let mut traffic = Self {
            kernel,
            stream: stream.clone(),
            buffer: Plain::new(stream.device(), buffer_bytes)?,
            buffer_bytes,
            bytes_per_second: f64::INFINITY,
        };
        if traffic.kernel.0.is_some() {
            // The best of a few tries, the first of which warms up.
            let mut best = Duration::MAX;
            for _ in 0..4 {
                let started = Instant::now();
                traffic.queue(TRIAL_BYTES)?;
                stream.synchronize()?;
                best = best.min(started.elapsed());
            }
            ensure!(!best.is_zero(), "memory traffic took no time");
            traffic.bytes_per_second = TRIAL_BYTES as f64 / best.as_secs_f64();
        }
        Ok(traffic)
    }

    fn queue(&self, bytes: usize) -> Result<()> {
        let (target, room_bytes) = (self.buffer.address(), self.buffer_bytes);
        // SAFETY: the memory is ours while this lives, which is beyond the stream's work: the owner
        // has synchronised before it drops this, and `cuMemFree` waits besides.
        unsafe { (self.kernel).write(&self.stream, target, room_bytes, bytes) }
    }

    /// Queues as much traffic as takes this long, in memory of its own.
    pub fn queue_for(&self, time: Duration) -> Result<()> {
        let bytes = (self.bytes_per_second * time.as_secs_f64()) as usize;
        self.queue(bytes.max(1))
    }
}
