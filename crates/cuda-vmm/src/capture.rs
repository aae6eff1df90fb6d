//! Which driver calls may be made while a stream is being captured.
//!
//! # Safety
//! The one unsafe call exchanges the calling thread's capture mode and takes a place on the stack.
#![allow(unsafe_code)]

use crate::driver::{Driver, call};
#[cfg(not(model_check))]
use crate::process::PerProcess;
use crate::process::Process;
#[cfg(model_check)]
use crate::sync::statics;
use crate::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use crate::sys::{CU_STREAM_CAPTURE_MODE_RELAXED, CUstreamCaptureMode};
use core::marker::PhantomData;

#[derive(Default)]
struct Declared {
    captures: usize,
    synchronising: usize,
}

/// What is declared in one process.
#[derive(Default)]
struct Captures {
    declared: Mutex<Declared>,
    changed: Condvar,
}

#[cfg(not(model_check))]
fn captures() -> &'static Captures {
    static CAPTURES: PerProcess<Captures> = PerProcess::new();
    CAPTURES.get()
}

#[cfg(model_check)]
statics! {
    static CAPTURES: Captures = Captures::default();
}
#[cfg(model_check)]
fn captures() -> &'static Captures {
    &CAPTURES
}

impl Captures {
    fn lock(&self) -> MutexGuard<'_, Declared> {
        self.declared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, declared: MutexGuard<'a, Declared>) -> MutexGuard<'a, Declared> {
        let waited = self.changed.wait(declared);
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the number of those that one has ended of, in the process that began it: another has
    /// none of its threads, and counts for itself.
    fn end(process: Process, change: impl FnOnce(&mut Declared)) {
        if process.check().is_ok() {
            let captures = captures();
            change(&mut captures.lock());
            captures.changed.notify_all();
        }
    }
}

/// Declares that a stream is being captured into a graph, in this process, until it is dropped.
///
/// A context synchronise kills every capture under way on that context, whatever the capture's
/// mode, and the driver gives no way to ask whether there is one. So hold a guard around
/// `cuStreamBeginCapture` … `cuStreamEndCapture`: meanwhile this crate does nothing that would kill
/// the capture. Memory that can only be given back after a context synchronise stays where it is
/// until the guard is gone. A forked process has none of its parent's captures.
///
/// A graph keeps addresses and no memory.
/// [`pin_for_graph`](crate::VirtualMemoryPool::pin_for_graph) keeps memory behind them for as long
/// as the graph can run. Blocks that a table names are no addresses of the graph: the table is an
/// input ([`BlockPin`](crate::pool::blocks::BlockPin)).
///
/// ```
/// # #[cfg(feature = "simulator")] {
/// # use cuda_vmm::{Device, sys::*};
/// use cuda_vmm::{CaptureGuard, Driver, Stream, VirtualMemoryPool};
/// # // Capturing and launching, for what calls the table.
/// # unsafe fn capture(device: &Device, stream: &Stream, work: impl FnOnce()) -> (CUgraph, CUgraphExec) {
/// #     let (table, mut graph, mut exec) = (device.driver().table(), std::ptr::null_mut(), std::ptr::null_mut());
/// #     unsafe {
/// #         assert_eq!((table.cuCtxSetCurrent)(device.raw_context()), CUDA_SUCCESS);
/// #         let mode = CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
/// #         assert_eq!((table.cuStreamBeginCapture)(stream.raw(), mode), CUDA_SUCCESS);
/// #         work();
/// #         assert_eq!((table.cuStreamEndCapture)(stream.raw(), &mut graph), CUDA_SUCCESS);
/// #         assert_eq!((table.cuGraphInstantiateWithFlags)(&mut exec, graph, 0), CUDA_SUCCESS);
/// #     }
/// #     (graph, exec)
/// # }
/// # unsafe fn launch(device: &Device, stream: &Stream, exec: CUgraphExec) {
/// #     assert_eq!(unsafe { (device.driver().table().cuGraphLaunch)(exec, stream.raw()) }, CUDA_SUCCESS);
/// # }
/// let device = Driver::detect()?.device(0)?;
/// let stream = Stream::new(&device)?;
/// let pool = VirtualMemoryPool::new(&device, 1 << 30, device.granularity_bytes())?;
/// pool.use_stream(&stream)?;
/// let address = pool.allocate(0, 4096)?;
///
/// let pin = pool.pin_for_graph(0, 4096)?;
/// // `capture` stands for cuStreamBeginCapture … cuStreamEndCapture and cuGraphInstantiate.
/// let (graph, exec) = {
///     let _guard = CaptureGuard::new();
///     // SAFETY: the bytes are pinned until the graph has run for the last time.
///     unsafe { capture(&device, &stream, || stream.memset(address, 7, 4096).unwrap()) }
/// };
///
/// // The pool grows and shrinks meanwhile. Pinned memory stays at its addresses, freed or not.
/// pool.allocate(4096, 256 << 20)?;
/// pool.deallocate(0, 4096 + (256 << 20))?;
/// // SAFETY: what the graph writes is pinned.
/// unsafe { launch(&device, &stream, exec) };
/// stream.synchronize()?;
///
/// drop(pin); // no launch comes any more
/// # let table = device.driver().table();
/// # assert_eq!(unsafe { (table.cuGraphExecDestroy)(exec) }, CUDA_SUCCESS);
/// # assert_eq!(unsafe { (table.cuGraphDestroy)(graph) }, CUDA_SUCCESS);
/// # }
/// # Ok::<(), cuda_vmm::VmmError>(())
/// ```
#[derive(Debug)]
#[must_use = "the capture is declared only while the guard lives"]
pub struct CaptureGuard(Process);

impl CaptureGuard {
    /// Declares a capture. Waits for a context synchronise of this crate that is under way, and for
    /// a [`compact`](crate::VirtualMemoryPool::compact).
    pub fn new() -> Self {
        let captures = captures();
        let mut state = captures.lock();
        state.captures += 1;
        while state.synchronising > 0 {
            state = captures.wait(state);
        }
        Self(Process::current())
    }

    /// Whether any capture is declared now.
    pub(crate) fn any() -> bool {
        captures().lock().captures > 0
    }

    /// Waits until no capture is declared, and holds new ones back while the result lives.
    pub(crate) fn wait_for_none() -> NoCapture {
        let captures = captures();
        let mut state = captures.lock();
        while state.captures > 0 {
            state = captures.wait(state);
        }
        state.synchronising += 1;
        NoCapture(Process::current())
    }

    /// As [`wait_for_none`](Self::wait_for_none), or `None` if a capture is declared.
    pub(crate) fn try_none() -> Option<NoCapture> {
        let mut state = captures().lock();
        (state.captures == 0).then(|| {
            state.synchronising += 1;
            NoCapture(Process::current())
        })
    }
}

impl Default for CaptureGuard {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for CaptureGuard {
    fn drop(&mut self) {
        Captures::end(self.0, |declared| declared.captures -= 1);
    }
}

/// No capture is declared, and none will be while this lives.
pub(crate) struct NoCapture(Process);

impl Drop for NoCapture {
    fn drop(&mut self) {
        Captures::end(self.0, |declared| declared.synchronising -= 1);
    }
}

/// Sets this thread's capture mode to relaxed until it is dropped, so that queries and waits do not
/// kill captures of other streams (`cuThreadExchangeStreamCaptureMode`).
pub(crate) struct Relaxed<'a> {
    driver: &'a Driver,
    before: CUstreamCaptureMode,
    /// The mode is the thread's, so the value must stay on its thread.
    not_send: PhantomData<*const ()>,
}

impl<'a> Relaxed<'a> {
    pub(crate) fn new(driver: &'a Driver) -> crate::Result<Self> {
        let mut mode = CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: `mode` is a valid place; the driver swaps it with the thread's mode.
        unsafe { call!(driver, cuThreadExchangeStreamCaptureMode(&mut mode)) }?;
        Ok(Self {
            driver,
            before: mode,
            not_send: PhantomData,
        })
    }
}

impl Drop for Relaxed<'_> {
    fn drop(&mut self) {
        let mut mode = self.before;
        // Cannot fail for a mode that the driver itself handed out.
        // SAFETY: as in `new`.
        let _ = unsafe { call!(self.driver, cuThreadExchangeStreamCaptureMode(&mut mode)) };
    }
}
