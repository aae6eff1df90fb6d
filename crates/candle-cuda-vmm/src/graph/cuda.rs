//! Capturing and launching a step on a CUDA device.
//!
//! # Safety
//! A captured step reads and writes its own tensors, which the closure owns or borrows as long as
//! the graph lives, memory of the graph, and what its tables and lengths name. The caller of
//! `replay` names that, and it is held in place while the launch is queued; what is freed later is
//! unmapped behind the launch. The promise of
//! [`ElasticBlocks::reserved_tensors`](crate::ElasticBlocks::reserved_tensors), without which no
//! table reaches blocks, covers what a caller leaves out.
#![allow(unsafe_code)]

use super::{Captured, Step, output};
use crate::device::device_of_stream;
use crate::error::{GraphError, Result, VmmError};
use crate::lease::core_stream;
use candle_core::{CudaDevice, Device};
use cuda_vmm::Graph;

/// Fails if the device's stream cannot be captured.
pub(super) fn check_device(device: &CudaDevice) -> Result<()> {
    let stream = device.cuda_stream();
    // The legacy default stream, by either handle, or a thread's own.
    if stream.cu_stream().addr() <= 2 {
        return Err(GraphError::DefaultStream.into());
    }
    match stream.context().is_event_tracking() {
        true => Err(GraphError::EventTracking.into()),
        false => Ok(()),
    }
}

/// Runs the step once, and captures it with a copy of its result.
pub(super) fn capture(cuda: &CudaDevice, batch: usize, step: &mut Step<'_>) -> Result<Captured> {
    let (stream, device) = (cuda.cuda_stream(), Device::Cuda(cuda.clone()));
    // Small arrays that operations copy from the host are kept on the device while the step runs
    // first, and are read there when it is captured.
    let _arrays = cuda.enable_cuda_graph_htod_cache();
    let output = {
        let made = step(batch).map_err(|error| GraphError::Warmup {
            batch,
            source: Box::new(error.into()),
        })?;
        output::like(&made, &device, batch)?
    };
    // cudarc keeps the errors of drops for later calls.
    let check_drops = || match stream.context().check_err() {
        Ok(()) => Ok(()),
        Err(_) => Err(GraphError::TensorDropped { batch }),
    };
    let core = core_stream(&device_of_stream(&stream)?, &stream);
    let captured = Graph::capture(&core, || {
        let made = step(batch)?;
        check_drops()?;
        output::check(&made, &output, batch)?;
        output::write(&output, &made)
    });
    let dropped = check_drops();
    let (mut graph, ()) = captured.map_err(|error| match error {
        VmmError::Graph(error) => error,
        error => GraphError::Capture {
            batch,
            source: Box::new(error),
        },
    })?;
    dropped?;
    let nodes = graph.nodes();
    if nodes.allocations != nodes.frees {
        return Err(GraphError::TensorKept {
            batch,
            allocations: nodes.allocations,
            frees: nodes.frees,
        }
        .into());
    }
    graph.upload()?;
    Ok(Captured {
        output,
        graph: Some(graph),
    })
}

/// Queues a captured step.
pub(super) fn launch(graph: &mut Graph) -> Result<()> {
    // SAFETY: what the step uses is there, as above.
    Ok(unsafe { graph.launch() }?)
}
