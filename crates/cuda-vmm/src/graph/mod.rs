//! Work of a stream that is captured once and launched many times.
//!
//! # Safety
//! A [`Graph`] owns its executable graph: made once, destroyed once, launched by one thread at a
//! time. All calls run with the device's context current.
#![allow(unsafe_code)]

mod capturing;
mod memory;
mod nodes;

pub use memory::GraphMemory;
pub use nodes::GraphNodes;

use crate::driver::call;
use crate::quarantine::Stuck;
use crate::sys::{CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH, CUgraphExec};
use crate::{Device, Result, Stream, VmmError};
use capturing::{Capturing, Template};
use core::ptr::null_mut;

/// What a stream was given between the begin and the end of a capture, to be launched as one piece
/// of work, any number of times (`cuGraphLaunch`).
///
/// A graph keeps addresses and no memory. What is mapped behind them when it runs is what it reads
/// and writes, so it stays valid while memory grows, shrinks and moves at unchanged addresses.
/// [`pin_for_graph`](crate::VirtualMemoryPool::pin_for_graph) and
/// [`BlockBacking::hold`](crate::pool::blocks::BlockBacking::hold) keep memory there.
///
/// Memory that the captured work allocates on the stream (`cuMemAllocAsync`) becomes memory of the
/// graph, with the same addresses at each launch. What the graph does not free itself is freed by
/// its next launch. [`Device::graph_memory`] tells how much the device holds for graphs.
///
/// ```
/// # #[cfg(feature = "simulator")] {
/// use cuda_vmm::{Driver, Graph, Stream, VirtualMemoryPool};
///
/// let device = Driver::detect()?.device(0)?;
/// let stream = Stream::new(&device)?;
/// let pool = VirtualMemoryPool::new(&device, 1 << 30, device.granularity_bytes())?;
/// pool.use_stream(&stream)?;
/// let address = pool.allocate(0, 4096)?;
/// // SAFETY: nothing runs before the launch.
/// let work = || unsafe { stream.memset(address, 7, 4096) };
/// let (mut graph, ()) = Graph::capture(&stream, work)?;
/// assert_eq!(graph.nodes().memsets, 1);
///
/// pool.allocate(4096, 256 << 20)?; // the pool grows
/// // SAFETY: the bytes are live, and what is freed later is unmapped behind the stream.
/// unsafe { graph.launch()? };
/// let mut byte = [0];
/// // SAFETY: as above.
/// unsafe { stream.read(address, &mut byte)? };
/// assert_eq!(byte, [7]);
/// # }
/// # Ok::<(), cuda_vmm::VmmError>(())
/// ```
#[derive(Debug)]
pub struct Graph {
    executable: Executable,
    stream: Stream,
    nodes: GraphNodes,
}

/// An executable graph. The driver destroys one that runs when it has ended.
#[derive(Debug)]
struct Executable {
    device: Device,
    raw: CUgraphExec,
}

// SAFETY: the graph is used through the driver's calls only, which may be made from any thread, by
// one at a time: launching takes `&mut Graph`.
unsafe impl Send for Executable {}
// SAFETY: as above.
unsafe impl Sync for Executable {}

impl Graph {
    /// Captures what `work` queues on the stream, and returns the graph with what `work` returned.
    /// Nothing of it runs (`cuStreamBeginCapture` in relaxed mode, `cuStreamEndCapture`,
    /// `cuGraphInstantiate`).
    ///
    /// A [`CaptureGuard`](crate::CaptureGuard) is held meanwhile. The capture ends in any case, also
    /// if `work` panics, and then the stream is as usable as before.
    ///
    /// # Errors
    /// What `work` returns. [`VmmError::Driver`]:
    /// - with `CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED` for the legacy default stream, which cannot be
    ///   captured, and with `CUDA_ERROR_ILLEGAL_STATE` if the stream is being captured;
    /// - with `CUDA_ERROR_STREAM_CAPTURE_INVALIDATED` if `work` waited for the stream, or made
    ///   another call that a capture does not survive; with `CUDA_ERROR_STREAM_CAPTURE_UNJOINED` if
    ///   it left work of another stream that waits for this one.
    pub fn capture<T, E: From<VmmError>>(
        stream: &Stream,
        work: impl FnOnce() -> core::result::Result<T, E>,
    ) -> core::result::Result<(Self, T), E> {
        let capturing = Capturing::begin(stream)?;
        let made = work()?;
        let template = capturing.end()?;
        let nodes = template.nodes()?;
        let executable = Executable::new(&template)?;
        let graph = Self {
            executable,
            stream: stream.clone(),
            nodes,
        };
        Ok((graph, made))
    }

    /// Queues the captured work on the stream that it was captured on. Does not wait.
    ///
    /// # Errors
    /// [`VmmError::Driver`]: `CUDA_ERROR_OUT_OF_MEMORY` if the device has no memory for what the
    /// graph allocates. The driver keeps what it had taken before it failed, as long as the process
    /// has the device.
    ///
    /// # Safety
    /// All that the captured work reads and writes is there when it runs: device addresses are
    /// mapped, and what host functions use is alive.
    pub unsafe fn launch(&mut self) -> Result<()> {
        let device = &self.executable.device;
        let _current = device.make_current()?;
        // SAFETY: graph and stream are alive; the caller vouches for what the work uses.
        unsafe {
            call!(
                device.driver(),
                cuGraphLaunch(self.executable.raw, self.stream.raw())
            )
        }
    }

    /// Makes ready what a launch needs on the device, so that the first takes no longer than the
    /// others (`cuGraphUpload`).
    ///
    /// # Errors
    /// [`VmmError::Driver`].
    pub fn upload(&mut self) -> Result<()> {
        let device = &self.executable.device;
        let _current = device.make_current()?;
        // SAFETY: graph and stream are alive.
        unsafe {
            call!(
                device.driver(),
                cuGraphUpload(self.executable.raw, self.stream.raw())
            )
        }
    }

    /// The stream that it was captured on, and that launches go to.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// What was captured.
    pub fn nodes(&self) -> GraphNodes {
        self.nodes
    }
}

impl Executable {
    fn new(template: &Template) -> Result<Self> {
        let device = template.device();
        let _current = device.make_current()?;
        let mut raw = null_mut();
        let flags = CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH.into();
        // SAFETY: `raw` is a valid place, and the graph is alive.
        unsafe {
            call!(
                device.driver(),
                cuGraphInstantiateWithFlags(&mut raw, template.raw(), flags)
            )
        }?;
        Ok(Self {
            device: device.clone(),
            raw,
        })
    }

    fn destroy(&self) -> Result<()> {
        let _current = self.device.make_current()?;
        // SAFETY: destroys what `new` made; after that nothing uses the handle.
        unsafe { call!(self.device.driver(), cuGraphExecDestroy(self.raw)) }
    }
}

impl Drop for Executable {
    fn drop(&mut self) {
        self.device.after_drop(self.destroy(), || Self {
            device: self.device.clone(),
            raw: self.raw,
        });
    }
}

impl Stuck for Executable {}
