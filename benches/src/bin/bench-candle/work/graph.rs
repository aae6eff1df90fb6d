//! The device's time of launches that are captured together, and of reading memory once.

use crate::machine::Machine;
use anyhow::Result;
use candle_core::{DType, Tensor};
use cuda_vmm_benches::{Outcome, Sides, time};
use std::time::Duration;

/// One round of a side.
pub type Round<'a> = Box<dyn FnMut() -> Result<Duration> + 'a>;

/// A round is the mean time of these launches: on a GPU that of a graph, between two events.
pub fn graph<'a>(
    machine: &'a Machine,
    launches: usize,
    mut launch: impl FnMut(usize) -> candle_core::Result<()> + 'a,
) -> Result<Round<'a>> {
    launch(0)?;
    machine.candle.synchronize()?;
    #[cfg(feature = "attention")]
    if let candle_core::Device::Cuda(device) = &machine.candle {
        use candle_core::cuda::cudarc::driver::sys::{
            CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode,
        };
        let stream = device.cuda_stream();
        let _guard = cuda_vmm::CaptureGuard::new();
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)?;
        let captured = (0..launches).try_for_each(&mut launch);
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(flags)?;
        captured?;
        let graph = anyhow::Context::context(graph, "nothing was captured")?;
        return Ok(Box::new(move || {
            // What it launches may own what the graph reads.
            let _launch = &launch;
            let event = || stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
            let started = event()?;
            graph.launch()?;
            let ended = event()?;
            ended.synchronize()?;
            let seconds = f64::from(started.elapsed_ms(&ended)?) / 1e3;
            Ok(Duration::from_secs_f64(seconds / launches as f64))
        }));
    }
    Ok(Box::new(move || {
        let all = || (0..launches).try_for_each(&mut launch);
        Ok(time(all)?.1 / launches as u32)
    }))
}

/// Measures the rate at which memory is read: by a kernel that does nothing else, or by a copy,
/// which reads and writes, if that is faster. Returns it in bytes a second.
pub fn read_rate(machine: &Machine, bytes: usize, outcome: &mut Outcome) -> Result<f64> {
    let memory = Tensor::ones(bytes, DType::U8, &machine.candle)?;
    let half = Tensor::zeros(bytes / 2, DType::U8, &machine.candle)?;
    let sum = Tensor::zeros(1, DType::U32, &machine.candle)?;
    let mut sides = Sides::default();
    let names = ["read-only stream", "copy"];
    let read = graph(machine, 4, |_| read_once(&memory, &sum))?;
    sides.add_rate(names[0], bytes as f64, read);
    let copy = graph(machine, 4, |_| half.copy().map(drop))?;
    sides.add_rate(names[1], bytes as f64, copy);
    outcome.measure(sides, &machine.settings, 20)?;
    let [read_us, copy_us] = [outcome.us(names[0], 500)?, outcome.us(names[1], 500)?];
    Ok(bytes as f64 / read_us.min(copy_us) * 1e6)
}

/// Reads all of a tensor.
fn read_once(memory: &Tensor, _sum: &Tensor) -> candle_core::Result<()> {
    #[cfg(feature = "attention")]
    if memory.device().is_cuda() {
        return cuda::read_once(memory, _sum);
    }
    memory.copy().map(drop)
}

#[cfg(feature = "attention")]
mod cuda {
    use candle_core::backend::BackendStorage;
    use candle_core::cuda::WrapErr;
    use candle_core::cuda::cudarc::driver::{LaunchConfig, PushKernelArg};
    use candle_core::{Error, Result, Storage, Tensor};

    /// Generated from the `.cu` beside it; `cargo xtask test --cuda` keeps the two in step.
    const PTX: &str = include_str!("read.ptx");
    const VECTOR_BYTES: usize = 16;

    /// Queues the kernel. Both tensors are whole storages.
    pub fn read_once(memory: &Tensor, sum: &Tensor) -> Result<()> {
        let (memory, sum) = (memory.storage_and_layout().0, sum.storage_and_layout().0);
        let (Storage::Cuda(memory), Storage::Cuda(sum)) = (&*memory, &*sum) else {
            return Err(Error::msg("not on a GPU"));
        };
        let function = memory
            .device()
            .get_or_load_custom_func("read_once", "read", PTX)?;
        let (memory, sum) = (memory.as_cuda_slice::<u8>()?, sum.as_cuda_slice::<u32>()?);
        let vectors = (memory.len() / VECTOR_BYTES) as u64;
        let mut launch = function.builder();
        launch.arg(memory).arg(&vectors).arg(sum);
        // As many as keep all of a large GPU's memory busy.
        let config = LaunchConfig {
            grid_dim: (1056, 1, 1),
            block_dim: (512, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: the arguments are those that the kernel declares; it reads `vectors` vectors of
        // `memory` and writes to `sum`, of which nothing else is made.
        unsafe { launch.launch(config) }.w().map(drop)
    }
}
