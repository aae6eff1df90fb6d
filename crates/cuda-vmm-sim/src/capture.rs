//! Stream capture, and the calls that invalidate it.

use crate::state::graphs::Capture;
use crate::state::streams::Key;
use crate::state::{DriverResult, Inner, State};
use cuda_vmm_sys::*;

impl Inner {
    /// Begins a call that is unsafe during capture. It invalidates the captures that are exposed to
    /// it by their mode, their thread and the calling thread's mode.
    ///
    /// A capture that is already invalidated counts until it ends.
    pub(crate) fn unsafe_call(&mut self) -> DriverResult {
        let mode = self.threads.get().capture_mode;
        if mode == CU_STREAM_CAPTURE_MODE_RELAXED {
            return Ok(());
        }
        let thread = std::thread::current().id();
        self.invalidate_exposed(|capture, _| {
            let own = capture.thread == thread && capture.mode != CU_STREAM_CAPTURE_MODE_RELAXED;
            let global = capture.mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
            own || global && mode == CU_STREAM_CAPTURE_MODE_GLOBAL
        })
    }

    /// Begins a call that waits for a whole context: it invalidates every capture there.
    pub(crate) fn invalidate_captures_of(&mut self, device: usize) -> DriverResult {
        self.invalidate_exposed(|_, owner| owner == device)
    }

    fn invalidate_exposed(&mut self, exposed: impl Fn(&Capture, usize) -> bool) -> DriverResult {
        let mut result = Ok(());
        for (capture, device, _) in self.streams.captures() {
            if exposed(capture, device) {
                capture.invalidated = true;
                result = Err(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
            }
        }
        result
    }

    /// Invalidates a capture, so that it makes no graph.
    pub(crate) fn invalidate(&mut self, id: u64) {
        for (capture, _, _) in self.streams.captures() {
            capture.invalidated |= capture.id == id;
        }
    }

    /// Fails and invalidates the capture if this stream is being captured.
    pub(crate) fn check_not_captured(&mut self, key: Key) -> DriverResult {
        match &mut self.streams.get_mut(key)?.capture {
            Some(capture) => {
                capture.invalidated = true;
                Err(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)
            }
            None => Ok(()),
        }
    }

    /// Fails if the stream is the legacy stream and a blocking stream, with which it is ordered, is
    /// being captured.
    pub(crate) fn check_implicit(&mut self, key: Key) -> DriverResult {
        if !self.streams.is_legacy(key) {
            return Ok(());
        }
        let device = self.streams.get(key)?.device;
        let mut result = Ok(());
        for (capture, owner, blocking) in self.streams.captures() {
            if blocking && owner == device {
                capture.invalidated = true;
                result = Err(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
            }
        }
        result
    }
}

impl State {
    pub(crate) fn begin_capture(
        &self,
        stream: CUstream,
        mode: CUstreamCaptureMode,
    ) -> DriverResult {
        if mode > CU_STREAM_CAPTURE_MODE_RELAXED {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        let mut inner = self.lock();
        let key = inner.enter_stream(stream)?;
        if inner.streams.is_legacy(key) {
            return Err(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        }
        inner.graphs.captures += 1;
        let id = inner.graphs.captures;
        let stream = inner.streams.get_mut(key)?;
        if stream.capture.is_some() {
            return Err(CUDA_ERROR_ILLEGAL_STATE);
        }
        stream.capture = Some(Capture {
            id,
            mode,
            thread: std::thread::current().id(),
            invalidated: false,
            nodes: Vec::new(),
        });
        Ok(())
    }

    /// Ends a capture and returns its graph or an error. The capture ends either way, unless the
    /// call is on the wrong thread.
    pub(crate) fn end_capture(&self, stream: CUstream) -> DriverResult<CUgraph> {
        let mut inner = self.lock();
        let key = inner.enter_stream(stream)?;
        let stream = inner.streams.get_mut(key)?;
        let capture = stream.capture.as_ref().ok_or(CUDA_ERROR_ILLEGAL_STATE)?;
        let own = capture.thread == std::thread::current().id();
        if !own && capture.mode != CU_STREAM_CAPTURE_MODE_RELAXED {
            return Err(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
        }
        let device = stream.device;
        match stream.capture.take() {
            Some(capture) if !capture.invalidated => {
                let key = inner.graphs.add_captured(device, capture);
                Ok(std::ptr::without_provenance_mut(key))
            }
            _ => {
                inner.forget_graph_memory();
                Err(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)
            }
        }
    }

    /// Returns the status. For the legacy stream it is an error while a blocking stream is
    /// captured, but the capture goes on.
    pub(crate) fn capture_status(&self, stream: CUstream) -> DriverResult<CUstreamCaptureStatus> {
        let mut inner = self.lock();
        let key = inner.enter_stream(stream)?;
        if inner.streams.is_legacy(key) {
            let device = inner.streams.get(key)?.device;
            let mut captures = inner.streams.captures();
            if captures.any(|(_, owner, blocking)| blocking && owner == device) {
                return Err(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
            }
        }
        Ok(match &inner.streams.get(key)?.capture {
            None => CU_STREAM_CAPTURE_STATUS_NONE,
            Some(capture) if capture.invalidated => CU_STREAM_CAPTURE_STATUS_INVALIDATED,
            Some(_) => CU_STREAM_CAPTURE_STATUS_ACTIVE,
        })
    }

    /// Sets the calling thread's capture mode and returns the previous one.
    pub(crate) fn exchange_capture_mode(
        &self,
        mode: CUstreamCaptureMode,
    ) -> DriverResult<CUstreamCaptureMode> {
        if mode > CU_STREAM_CAPTURE_MODE_RELAXED {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        let before = self.threads.get().capture_mode;
        self.threads.update(|thread| thread.capture_mode = mode);
        Ok(before)
    }
}
