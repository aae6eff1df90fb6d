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
use crate::lease::{self, core_stream};
use candle_core::cuda::cudarc::cublas::{CudaBlas, sys as cublas};
use candle_core::cuda::cudarc::driver::{CudaStream, DevicePtr};
use candle_core::{CudaDevice, DType, Device, Storage, Tensor};
use cuda_vmm::Graph;
use std::sync::Arc;

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

/// The workspace that cuBLAS asks for on new GPUs, in bytes.
const WORKSPACE_BYTES: usize = 32 << 20;

/// What the captured steps of one graph have beside their tensors.
pub(super) struct Shared {
    /// What cuBLAS writes to in captured steps. Otherwise each of its products would allocate in the
    /// graph.
    workspace: Tensor,
}

impl Shared {
    pub(super) fn new(device: &Device) -> Result<Self> {
        let workspace = Tensor::zeros(WORKSPACE_BYTES, DType::U8, device)?;
        Ok(Self { workspace })
    }

    /// Has cuBLAS use the workspace while the result lives.
    fn lend(&self, device: &CudaDevice) -> impl Sized {
        struct Lent(Arc<CudaBlas>, Arc<CudaStream>);

        impl Drop for Lent {
            fn drop(&mut self) {
                // SAFETY: handle and stream are alive. Naming the stream again ends the use of the
                // workspace.
                let ended = unsafe {
                    cublas::cublasSetStream_v2(*self.0.handle(), self.1.cu_stream().cast())
                };
                if let Err(error) = ended.result() {
                    tracing::warn!(%error, "cuBLAS keeps a workspace that was lent");
                }
            }
        }

        let (blas, stream) = (device.cublas_handle(), device.cuda_stream());
        let (storage, _) = self.workspace.storage_and_layout();
        if let Storage::Cuda(storage) = &*storage
            && let Ok(slice) = storage.as_cuda_slice::<u8>()
        {
            let (address, _read) = slice.device_ptr(&stream);
            let address = std::ptr::with_exposed_provenance_mut(address as usize);
            // SAFETY: the memory has this size, and lives as long as the graphs whose steps name
            // it. The handle works on one stream.
            let lent =
                unsafe { cublas::cublasSetWorkspace_v2(*blas.handle(), address, WORKSPACE_BYTES) };
            if let Err(error) = lent.result() {
                tracing::debug!(%error, "cuBLAS allocates in captured steps");
            }
        }
        Lent(blas, stream)
    }
}

/// Has Candle keep small arrays from the host on the device, while the result lives.
pub(super) fn keep_arrays(device: &Device) -> impl Sized {
    match device {
        Device::Cuda(device) => Some(device.enable_cuda_graph_htod_cache()),
        _ => None,
    }
}

/// Captures the step, which has run, with a copy of its result to `output`.
pub(super) fn capture(
    cuda: &CudaDevice,
    shared: &Shared,
    batch: usize,
    step: &mut Step<'_>,
    output: Tensor,
) -> Result<Captured> {
    let stream = cuda.cuda_stream();
    let _workspace = shared.lend(cuda);
    let _arrays = cuda.enable_cuda_graph_htod_cache();
    // cudarc keeps the errors of drops for later calls.
    let check_drops = || match stream.context().check_err() {
        Ok(()) => Ok(()),
        Err(_) => Err(GraphError::TensorDropped { batch }),
    };
    let failed = |error| GraphError::Capture {
        batch,
        source: Box::new(error),
    };
    let core = core_stream(&device_of_stream(&stream)?, &stream);
    let captured = Graph::capture(&core, || {
        let _captured = lease::refuse_on_this_thread();
        let made = step(batch).map_err(|error| failed(error.into()))?;
        check_drops()?;
        output::check(&made, &output, batch)?;
        output::write(&output, &made)
    });
    let dropped = check_drops();
    let (mut graph, ()) = captured.map_err(|error| match error {
        VmmError::Graph(error) => error,
        error => failed(error),
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
