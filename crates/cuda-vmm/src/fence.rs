//! Has the device finished with this?
//!
//! # Safety
//! A [`Fence`] owns its event: created and recorded in one step, destroyed once. All calls on it run
//! with its device's context current.
#![allow(unsafe_code)]

use crate::capture::{NoCapture, Relaxed};
use crate::driver::call;
use crate::quarantine::{self, Stuck};
use crate::sys::{CU_EVENT_DISABLE_TIMING, CUDA_ERROR_NOT_READY, CUevent, CUstream};
use crate::{Device, Result};
use core::ptr::null_mut;

/// A point in the work of a stream, or of a whole context (an event without timing).
///
/// Asking and waiting exchange the thread's capture mode to relaxed, so they disturb no capture.
#[derive(Debug)]
pub struct Fence {
    device: Device,
    event: CUevent,
    /// The stream whose work it ends, by its handle; none for a whole context.
    stream: Option<CUstream>,
}

// SAFETY: the event is used through the driver's calls only, which may be made from any thread; the stream is only
// compared.
unsafe impl Send for Fence {}
// SAFETY: as above.
unsafe impl Sync for Fence {}

impl Fence {
    fn create(device: &Device) -> Result<Self> {
        let mut event = null_mut();
        // SAFETY: `event` is a valid place, and callers have the context current.
        unsafe {
            call!(
                device.driver(),
                cuEventCreate(&mut event, CU_EVENT_DISABLE_TIMING as _)
            )
        }?;
        Ok(Self {
            device: device.clone(),
            event,
            stream: None,
        })
    }

    /// Everything queued on the stream so far.
    ///
    /// # Safety
    /// `stream` must be a live stream of the device's context.
    pub(crate) unsafe fn on_stream(device: &Device, stream: CUstream) -> Result<Self> {
        let _current = device.make_current()?;
        let mut fence = Self::create(device)?;
        fence.stream = Some(stream);
        // SAFETY: the event is new and the stream alive, as the caller promises.
        unsafe { call!(device.driver(), cuEventRecord(fence.event, stream)) }?;
        Ok(fence)
    }

    /// Everything queued on any stream of the context so far (`cuCtxRecordEvent`), or `None` where the
    /// driver has no such call (before CUDA 12.5). It would end captures, so none may be declared.
    pub(crate) fn on_context(device: &Device, _no_capture: &NoCapture) -> Result<Option<Self>> {
        let Some(record) = device.driver().table().cuCtxRecordEvent else {
            return Ok(None);
        };
        let _current = device.make_current()?;
        let fence = Self::create(device)?;
        // SAFETY: context and event are alive, both owned by us.
        let code = unsafe { record(device.raw_context(), fence.event) };
        device
            .driver()
            .check(crate::sys::DriverFunction::cuCtxRecordEvent, code)?;
        Ok(Some(fence))
    }

    /// Whether the device is past it (`cuEventQuery`). Never waits.
    ///
    /// # Errors
    /// [`VmmError::Driver`](crate::VmmError::Driver), also for work that failed earlier.
    pub fn is_complete(&self) -> Result<bool> {
        let _current = self.device.make_current()?;
        let _relaxed = Relaxed::new(self.device.driver())?;
        self.device.driver().check_process()?;
        // SAFETY: the event is owned by this object.
        let code = unsafe { (self.device.driver().table().cuEventQuery)(self.event) };
        if code == CUDA_ERROR_NOT_READY {
            return Ok(false);
        }
        self.device
            .driver()
            .check(crate::sys::DriverFunction::cuEventQuery, code)?;
        Ok(true)
    }

    /// Waits until the device is past it (`cuEventSynchronize`).
    ///
    /// # Errors
    /// [`VmmError::Driver`](crate::VmmError::Driver), also for work that failed earlier.
    pub fn wait(&self) -> Result<()> {
        let _current = self.device.make_current()?;
        let _relaxed = Relaxed::new(self.device.driver())?;
        // SAFETY: the event is owned by this object.
        unsafe { call!(self.device.driver(), cuEventSynchronize(self.event)) }
    }

    /// The device whose work it marks.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether it was recorded on this stream, so that later work of the stream comes after it anyway. The caller knows
    /// that the stream it was recorded on is still there: handles of streams that are gone come again.
    pub(crate) fn is_on(&self, stream: CUstream) -> bool {
        self.stream == Some(stream)
    }

    pub(crate) fn raw(&self) -> CUevent {
        self.event
    }
}

impl Fence {
    fn destroy(&self) -> Result<()> {
        let _current = self.device.make_current()?;
        // SAFETY: destroys the event that `create` made; once it worked, nobody has it any more.
        unsafe { call!(self.device.driver(), cuEventDestroy(self.event)) }
    }
}

impl Drop for Fence {
    fn drop(&mut self) {
        quarantine::after_drop(&self.device, self.destroy(), || {
            Stuck::Fence(Self {
                device: self.device.clone(),
                event: self.event,
                stream: self.stream,
            })
        });
    }
}
