//! Has the device finished with this?
//!
//! # Safety
//! A [`Fence`] owns its event: created and recorded in one step, destroyed once. All calls on it
//! run with its device's context current.
#![allow(unsafe_code)]

use crate::capture::{NoCapture, Relaxed};
use crate::driver::call;
use crate::quarantine::Stuck;
use crate::stream_handle::Handle;
use crate::sync::{Arc, Weak};
use crate::sys::{CU_EVENT_DISABLE_TIMING, CUDA_ERROR_NOT_READY, CUevent};
use crate::{Device, Result};
use core::ptr::null_mut;

/// A point in the work of a stream, or of a whole context (an event without timing).
///
/// Asking and waiting exchange the thread's capture mode to relaxed, so they disturb no capture.
#[derive(Debug)]
pub struct Fence {
    device: Device,
    event: CUevent,
    /// The stream whose work it ends; none for a whole context. It does not keep the stream alive,
    /// but tells it from one that the driver gives the same handle later.
    stream: Option<Weak<Handle>>,
}

// SAFETY: the event is used through the driver's calls only, which may be made from any thread.
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
    pub(crate) fn on_stream(stream: &Arc<Handle>) -> Result<Self> {
        let device = stream.device();
        let _current = device.make_current()?;
        let mut fence = Self::create(device)?;
        fence.stream = Some(Arc::downgrade(stream));
        // SAFETY: the event is new, and the stream is alive while its handle is.
        unsafe { call!(device.driver(), cuEventRecord(fence.event, stream.raw())) }?;
        Ok(fence)
    }

    /// Everything queued on any stream of the context so far (`cuCtxRecordEvent`), or `None` if the
    /// driver has no such call (before CUDA 12.5). It would kill captures, so none may be declared.
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

    /// Whether it was recorded on this stream, so that later work of the stream comes after it
    /// anyway.
    pub(crate) fn is_on(&self, stream: &Arc<Handle>) -> bool {
        let is_it = |own: &Weak<Handle>| core::ptr::eq(own.as_ptr(), Arc::as_ptr(stream));
        self.stream.as_ref().is_some_and(is_it)
    }

    /// The address of the stream that it was recorded on. It names no other stream while the fence
    /// lives.
    pub(crate) fn stream_address(&self) -> Option<usize> {
        self.stream.as_ref().map(|own| own.as_ptr().addr())
    }

    pub(crate) fn raw(&self) -> CUevent {
        self.event
    }
}

impl Fence {
    fn destroy(&self) -> Result<()> {
        let _current = self.device.make_current()?;
        // SAFETY: destroys the event that `create` made; after that nothing uses the handle.
        unsafe { call!(self.device.driver(), cuEventDestroy(self.event)) }
    }
}

impl Drop for Fence {
    fn drop(&mut self) {
        self.device.after_drop(self.destroy(), || Self {
            device: self.device.clone(),
            event: self.event,
            stream: self.stream.clone(),
        });
    }
}

impl Stuck for Fence {}

#[cfg(all(test, feature = "simulator", not(model_check)))]
mod tests {
    use crate::sim::SimConfig;
    use crate::{Driver, Stream};

    #[test]
    fn a_stream_is_not_taken_for_one_that_had_its_handle_before() {
        let driver = Driver::simulated(SimConfig::new()).expect("a simulator");
        let device = driver.device(0).expect("a device");
        let alive = Stream::new(&device).expect("a stream");
        // SAFETY: it is alive to the end.
        let borrow = || unsafe { Stream::borrow(&device, alive.raw()) };
        let before = borrow();
        let fence = before.record().expect("recorded");
        assert!(fence.is_on(before.clone().handle()));
        drop(before);
        let after: Vec<_> = (0..100).map(|_| borrow()).collect();
        for stream in &after {
            assert_eq!(stream.raw(), alive.raw());
            assert!(!fence.is_on(stream.handle()));
        }
    }
}
