//! A capture under way, and the graph that it ends in.
//!
//! # Safety
//! A capture that has begun ends once. The graph is destroyed once. All calls run with the device's
//! context current.
#![allow(unsafe_code)]

use super::nodes::GraphNodes;
use crate::driver::call;
use crate::quarantine::Stuck;
use crate::sys::{CU_STREAM_CAPTURE_MODE_RELAXED, CUgraph};
use crate::{CaptureGuard, Device, Result, Stream};
use core::ptr::null_mut;

/// A stream that is being captured. Dropping it ends the capture and throws away what was captured.
pub(super) struct Capturing<'a> {
    stream: &'a Stream,
    is_over: bool,
    /// Dropped after the capture has ended.
    _declared: CaptureGuard,
}

impl<'a> Capturing<'a> {
    pub(super) fn begin(stream: &'a Stream) -> Result<Self> {
        let device = stream.device();
        device.driver().check_process()?;
        let declared = CaptureGuard::new();
        let _current = device.make_current()?;
        let mode = CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is alive.
        unsafe { call!(device.driver(), cuStreamBeginCapture(stream.raw(), mode)) }?;
        Ok(Self {
            stream,
            is_over: false,
            _declared: declared,
        })
    }

    pub(super) fn end(mut self) -> Result<Template> {
        let ended = Self::end_on(self.stream);
        self.is_over = ended.is_ok();
        ended
    }

    fn end_on(stream: &Stream) -> Result<Template> {
        let device = stream.device();
        let _current = device.make_current()?;
        let mut raw = null_mut();
        // SAFETY: `raw` is a valid place, and the stream is alive.
        unsafe { call!(device.driver(), cuStreamEndCapture(stream.raw(), &mut raw)) }?;
        Ok(Template {
            device: device.clone(),
            raw,
        })
    }
}

impl Drop for Capturing<'_> {
    fn drop(&mut self) {
        if !self.is_over {
            // The error is that of the work, or of the first try, which is told already. If that
            // has ended the capture, this one is refused.
            drop(Self::end_on(self.stream));
        }
    }
}

/// What was captured, of which an executable graph is made.
#[derive(Debug)]
pub(super) struct Template {
    device: Device,
    raw: CUgraph,
}

// SAFETY: the graph is used through the driver's calls only, by the thread that has it.
unsafe impl Send for Template {}
// SAFETY: as above.
unsafe impl Sync for Template {}

impl Template {
    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    pub(super) fn raw(&self) -> CUgraph {
        self.raw
    }

    pub(super) fn nodes(&self) -> Result<GraphNodes> {
        GraphNodes::of(&self.device, self.raw)
    }

    fn destroy(&self) -> Result<()> {
        let _current = self.device.make_current()?;
        // SAFETY: destroys what the capture made; after that nothing uses the handle.
        unsafe { call!(self.device.driver(), cuGraphDestroy(self.raw)) }
    }
}

impl Drop for Template {
    fn drop(&mut self) {
        self.device.after_drop(self.destroy(), || Self {
            device: self.device.clone(),
            raw: self.raw,
        });
    }
}

impl Stuck for Template {}
