//! A decode step that is captured once, and runs again and again while caches grow.
//!
//! See [`DecodeGraph`].
//!
//! # Safety
//! A captured step keeps addresses. The step owns or borrows what is there, and lives as long as the
//! captures, except between [`pause`](DecodeGraph::pause) and [`resume`](DecodeGraph::resume), when
//! nothing is launched. Whoever resumes promises that the same tensors are at the same addresses.
#![deny(clippy::unwrap_used)]
#![allow(unsafe_code)]

#[cfg(feature = "cuda")]
mod cuda;
mod memory;
mod options;
mod output;

pub use crate::error::GraphError;
pub use memory::{StepBlocks, StepMemory};
pub use options::DecodeGraphOptions;

use crate::attention::is_same_stream;
use crate::error::Result;
use candle_core::{Device, Tensor};
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

/// The step of a bucket.
type Step<'a> = Box<dyn FnMut(usize) -> candle_core::Result<Tensor> + 'a>;

/// A decode step, captured once for each size of batch, and replayed by one launch.
///
/// A step of Candle operations launches hundreds of kernels, one by one, from the host. On a GPU
/// that takes several times as long as the kernels themselves. A captured step is launched as one
/// piece of work (a CUDA graph). It keeps the addresses of all tensors. So everything that differs
/// from step to step is read from tensors that were made before, at the same addresses: tokens,
/// positions, lengths, block tables. Sequences may grow, come and go without another capture.
///
/// # The step
/// `step(bucket)` computes one step for `bucket` sequences from such tensors, and returns one
/// tensor. That is copied to a tensor made before, which [`replay`](Self::replay) returns.
///
/// - It is called when a bucket is captured: once to run, so that kernels and handles of libraries
///   are loaded, and once to be captured. The first replay follows. So a step must be one that may
///   run twice: [`attention::write`](crate::attention::write) writes the same rows again.
/// - It must not read results on the host, copy from the host what differs from step to step, or
///   wait for the device. Arrays that it copies from the host have at most 4 KiB.
/// - It must not keep tensors that it makes, nor drop tensors that were made before.
/// - It must not append to caches of a pool, nor take views of them: their addresses are of a
///   moment. Make views before.
/// - It uses no other stream. While it is captured, no other thread uses the device: that work
///   would become a part of the graph.
///
/// What breaks these rules is a [`GraphError`] when the step is captured, and the device is usable
/// after it. Not found are work on other streams, and that of other threads. What the step owns or borrows lives as long as this object, so weights and inputs stay
/// where they are. Do not put others in their place through a `RefCell` or a lock.
///
/// # Memory that goes away
/// Caches give memory back while the step's tensors live. Hand [`replay`](Self::replay) what the
/// step reaches ([`StepMemory`]): [`StepBlocks`] for blocks that tables name,
/// [`RowsWatch`](crate::RowsWatch) for rows of caches. It is kept in place from the check until the
/// launch is queued. What goes away after that is unmapped behind the step. A replay over memory
/// that has gone is an error and launches nothing.
///
/// # On a GPU
/// The device must be one of [`device::cuda_with_own_stream`]. The graph stays on the thread that
/// made it, because Candle keeps small arrays that captured steps read for as long as that thread
/// lives.
///
/// It takes 32 MiB for cuBLAS. Tensors that the step makes and drops are memory of the graph, which the device holds beside all
/// budgets: [`cuda_vmm::Device::graph_memory`]. The graphs of a device share it.
///
/// # On a CPU device
/// Each replay runs the step. So the same program runs anywhere.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_cuda_vmm::graph::{DecodeGraph, DecodeGraphOptions};
///
/// # fn main() -> candle_cuda_vmm::Result<()> {
/// let device = Device::Cpu; // on a GPU: `device::cuda_with_own_stream(0)?`
/// let weight = Tensor::ones((3, 2), DType::F32, &device)?;
/// // The inputs of the largest bucket. Those of a smaller one are the first of them.
/// let inputs = Tensor::zeros((4, 3), DType::F32, &device)?;
/// let step = |bucket| inputs.narrow(0, 0, bucket)?.matmul(&weight);
/// let mut graph = DecodeGraph::new(&device, DecodeGraphOptions::up_to(4), step)?;
///
/// inputs.slice_set(&Tensor::ones((3, 3), DType::F32, &device)?, 0, 0)?;
/// let outputs = graph.replay(3, &mut ())?; // captures the bucket of 4
/// assert_eq!(outputs.to_vec2::<f32>()?, [[3.; 2]; 3]);
/// # Ok(())
/// # }
/// ```
///
/// [`device::cuda_with_own_stream`]: crate::device::cuda_with_own_stream
pub struct DecodeGraph<'a> {
    device: Device,
    options: DecodeGraphOptions,
    /// Dropped before what their graphs name.
    captured: BTreeMap<usize, Captured>,
    #[cfg(feature = "cuda")]
    shared: Option<cuda::Shared>,
    /// `None` while it is paused.
    step: Option<Step<'a>>,
    counts: GraphCounts,
    /// Candle's arrays for captured steps are of a thread.
    on_its_thread: PhantomData<*const ()>,
}

/// A bucket that can be replayed.
struct Captured {
    /// The result of the last step.
    output: Tensor,
    /// `None` on a CPU device.
    #[cfg(feature = "cuda")]
    graph: Option<cuda_vmm::Graph>,
}

/// How often a [`DecodeGraph`] has captured and replayed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct GraphCounts {
    /// Buckets that were captured.
    pub captures: u64,
    /// Steps that were launched.
    pub replays: u64,
}

/// How far [`DecodeGraph::capture_all`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CaptureProgress {
    /// The size of the bucket that was captured last.
    pub bucket: usize,
    /// Buckets that are captured.
    pub done: usize,
    /// All buckets.
    pub total: usize,
}

impl<'a> DecodeGraph<'a> {
    /// Makes a graph without captures.
    ///
    /// # Errors
    /// - [`GraphError::DefaultStream`] and [`GraphError::EventTracking`] for a CUDA device that was
    ///   not made by [`cuda_with_own_stream`](crate::device::cuda_with_own_stream).
    /// - [`UnsupportedDevice`](crate::VmmError::UnsupportedDevice) for a device that is neither a
    ///   CPU nor a CUDA device.
    pub fn new(
        device: &Device,
        options: DecodeGraphOptions,
        step: impl FnMut(usize) -> candle_core::Result<Tensor> + 'a,
    ) -> Result<Self> {
        match device {
            Device::Cpu => {}
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => cuda::check_device(device)?,
            _ => return Err(crate::VmmError::UnsupportedDevice),
        }
        Ok(Self {
            device: device.clone(),
            options,
            captured: BTreeMap::new(),
            #[cfg(feature = "cuda")]
            shared: match device.is_cuda() {
                true => Some(cuda::Shared::new(device)?),
                false => None,
            },
            step: Some(Box::new(step)),
            counts: GraphCounts::default(),
            on_its_thread: PhantomData,
        })
    }

    /// Captures the bucket of a batch, unless it is captured. The step runs once before, over the
    /// memory that it reaches.
    ///
    /// The inputs must be such that the step may run: lengths of 0, if there are no sequences yet.
    ///
    /// # Errors
    /// After an error the bucket is not captured, and the others are as before.
    /// - Any [`GraphError`]; [`GraphError::Paused`] while it is paused.
    /// - What [`StepMemory::while_held`] returns: [`GraphError::RowsMoved`], or `NotBacked` for a
    ///   block. Then the step did not run.
    /// - [`CandleError`](crate::VmmError::CandleError) or [`Vmm`](crate::VmmError::Vmm) if there is
    ///   no memory for the result.
    pub fn capture(&mut self, batch: usize, memory: &mut dyn StepMemory) -> Result<()> {
        let bucket = self.options.bucket(batch)?;
        if self.captured.contains_key(&bucket) {
            return Ok(());
        }
        self.check_stream(memory)?;
        let Self { device, step, .. } = self;
        let step = step.as_mut().ok_or(GraphError::Paused)?;
        let mut output = None;
        memory.while_held(&mut || {
            output = Some(warm_up(device, bucket, step)?);
            Ok(())
        })?;
        // A memory that does not launch has refused.
        let Some(output) = output else {
            return Ok(());
        };
        #[cfg(feature = "cuda")]
        let captured = match (device, &self.shared) {
            (Device::Cuda(device), Some(shared)) => {
                cuda::capture(device, shared, bucket, step, output)?
            }
            _ => Captured {
                output,
                graph: None,
            },
        };
        #[cfg(not(feature = "cuda"))]
        let captured = Captured { output };
        self.captured.insert(bucket, captured);
        self.counts.captures += 1;
        Ok(())
    }

    /// Captures all buckets that are not captured, the largest first, and tells after each how far
    /// it is.
    ///
    /// # Errors
    /// As [`capture`](Self::capture), of the first bucket that fails.
    pub fn capture_all(
        &mut self,
        memory: &mut dyn StepMemory,
        mut progress: impl FnMut(CaptureProgress),
    ) -> Result<()> {
        let buckets: Vec<_> = self.options.buckets().rev().collect();
        for bucket in &buckets {
            if self.captured.contains_key(bucket) {
                continue;
            }
            self.capture(*bucket, memory)?;
            progress(CaptureProgress {
                bucket: *bucket,
                done: self.captured.len(),
                total: buckets.len(),
            });
        }
        Ok(())
    }

    /// Runs the step for a batch, in the smallest bucket that has room for it, and returns its
    /// result. Captures the bucket first, if need be. Does not wait for the device.
    ///
    /// If the first dimension of the result is that of the bucket, only the first `batch` rows are
    /// returned. The next replay of the same bucket writes over them: copy what is to stay.
    ///
    /// # Errors
    /// - Those of [`capture`](Self::capture).
    /// - [`GraphError::AnotherStream`] if the memory is of another device or stream, and what
    ///   [`StepMemory::while_held`] returns. Then nothing was launched.
    /// - [`Vmm`](crate::VmmError::Vmm) with the driver's error, such as out of memory for what the
    ///   step allocates.
    /// - On a CPU device, any error of the step.
    pub fn replay(&mut self, batch: usize, memory: &mut dyn StepMemory) -> Result<Tensor> {
        let bucket = self.options.bucket(batch)?;
        self.check_stream(memory)?;
        self.capture(bucket, memory)?;
        let Self { captured, step, .. } = self;
        let step = step.as_mut().ok_or(GraphError::Paused)?;
        // It was captured above.
        let Some(captured) = captured.get_mut(&bucket) else {
            return Err(GraphError::NoBucket {
                batch,
                batch_max: bucket,
            }
            .into());
        };
        memory.while_held(&mut || captured.launch(bucket, step))?;
        self.counts.replays += 1;
        let output = captured.output.clone();
        match output.dims().first() == Some(&bucket) && batch < bucket {
            true => Ok(output.narrow(0, 0, batch)?),
            false => Ok(output),
        }
    }

    fn check_stream(&self, memory: &dyn StepMemory) -> Result<()> {
        match memory.device() {
            Some(device) if !is_same_stream(device, &self.device) => {
                Err(GraphError::AnotherStream.into())
            }
            _ => Ok(()),
        }
    }

    /// Drops the step, with the tensors that it owns, and keeps the captures. Until
    /// [`resume`](Self::resume) nothing is captured or launched. So the weights of the step can
    /// sleep ([`ElasticModel`](crate::ElasticModel)).
    ///
    /// Steps that were launched may still run: synchronise the device before memory goes.
    pub fn pause(&mut self) {
        self.step = None;
    }

    /// Whether it is paused.
    pub fn is_paused(&self) -> bool {
        self.step.is_none()
    }

    /// Goes on with this step, and with the captures of the one before.
    ///
    /// # Safety
    /// The step must compute the same as the one before, from tensors of the same shapes and dtypes
    /// at the same addresses, and own or borrow them as that one did. That is so for weights that
    /// have slept and are awake again, if all else that the step reads has stayed. If it has not,
    /// [`clear`](Self::clear) the captures first; then any step will do.
    pub unsafe fn resume(&mut self, step: impl FnMut(usize) -> candle_core::Result<Tensor> + 'a) {
        self.step = Some(Box::new(step));
    }

    /// Forgets all captures, for example after rows have moved. The next steps are captured anew.
    pub fn clear(&mut self) {
        self.captured.clear();
    }

    /// Returns what was captured of a bucket, if it was, and on a GPU.
    #[cfg(feature = "cuda")]
    pub fn nodes(&self, bucket: usize) -> Option<cuda_vmm::GraphNodes> {
        let captured = self.captured.get(&bucket)?;
        captured.graph.as_ref().map(cuda_vmm::Graph::nodes)
    }

    /// Returns how often it has captured and replayed.
    pub fn counts(&self) -> GraphCounts {
        self.counts
    }

    /// Returns the options.
    pub fn options(&self) -> &DecodeGraphOptions {
        &self.options
    }

    /// Returns the device.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

/// Runs the step, and returns a tensor for its results, with this one in it.
fn warm_up(device: &Device, batch: usize, step: &mut Step<'_>) -> Result<Tensor> {
    // Small arrays that operations copy from the host are kept on the device while the step runs
    // first, and are read there when it is captured.
    #[cfg(feature = "cuda")]
    let _arrays = cuda::keep_arrays(device);
    let made = step(batch).map_err(|error| GraphError::Warmup {
        batch,
        source: Box::new(error.into()),
    })?;
    let output = output::like(&made, device, batch)?;
    output::write(&output, &made)?;
    Ok(output)
}

impl Captured {
    /// Queues the step, or runs it.
    fn launch(&mut self, bucket: usize, step: &mut Step<'_>) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(graph) = &mut self.graph {
            return cuda::launch(graph);
        }
        let made = step(bucket)?;
        output::check(&made, &self.output, bucket)?;
        output::write(&self.output, &made)
    }
}

impl fmt::Debug for DecodeGraph<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("DecodeGraph")
            .field("options", &self.options)
            .field("captured", &self.captured.keys())
            .field("counts", &self.counts)
            .finish_non_exhaustive()
    }
}
