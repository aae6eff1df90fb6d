//! A stream by the driver's handle: what fences and pools keep of it.
//!
//! # Safety
//! A stream is alive while its [`Handle`] is: the handle owns it and destroys it once, or keeps its
//! owner alive, or borrows it from an owner that promised to outlive it. All calls run with the
//! device's context current.
#![allow(unsafe_code)]

use crate::capture::Relaxed;
use crate::driver::call;
use crate::foreign::Foreign;
use crate::quarantine::Stuck;
use crate::sys::{CU_STREAM_CAPTURE_STATUS_NONE, CUDA_ERROR_NOT_READY, CUstream};
use crate::{Device, Result};
use core::any::Any;

/// What is known of a stream by all that hold it. Its place in memory is its identity: the driver's
/// handles come again.
#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) device: Device,
    pub(crate) raw: CUstream,
    /// Whether it is destroyed with the handle.
    pub(crate) is_owned: bool,
    /// What keeps a borrowed stream alive; dropped after its last use.
    #[allow(dead_code, reason = "owned to be dropped")]
    pub(crate) owner: Option<Foreign<std::sync::Arc<dyn Any + Send + Sync>>>,
}

// SAFETY: the stream is used through the driver's calls only, which may be made from any thread.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Handle {
    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    pub(crate) fn raw(&self) -> CUstream {
        self.raw
    }

    /// Whether it stands for each thread's own default stream.
    pub(crate) fn is_per_thread(&self) -> bool {
        self.raw.addr() == 2
    }

    /// As [`Stream::is_capturing`](crate::Stream::is_capturing).
    pub(crate) fn is_capturing(&self) -> Result<bool> {
        let _current = self.device.make_current()?;
        let mut status = CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: `status` is a valid place and the stream alive.
        unsafe {
            call!(
                self.device.driver(),
                cuStreamIsCapturing(self.raw, &mut status)
            )
        }?;
        Ok(status != CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// Whether it is a default stream. An event recorded there comes after work of others too.
    pub(crate) fn is_default(&self) -> bool {
        self.raw.addr() <= 2
    }

    /// Whether everything queued so far is done (`cuStreamQuery`). Never waits. False of the
    /// default streams.
    pub(crate) fn is_idle(&self) -> Result<bool> {
        if self.is_default() {
            return Ok(false);
        }
        let _current = self.device.make_current()?;
        let _relaxed = Relaxed::new(self.device.driver())?;
        self.device.driver().check_process()?;
        // SAFETY: the stream is alive.
        let code = unsafe { (self.device.driver().table().cuStreamQuery)(self.raw) };
        if code == CUDA_ERROR_NOT_READY {
            return Ok(false);
        }
        (self.device.driver()).check(crate::sys::DriverFunction::cuStreamQuery, code)?;
        Ok(true)
    }

    fn destroy(&self) -> Result<()> {
        let _current = self.device.make_current()?;
        // SAFETY: destroys the stream that `new` made; after that nothing uses the handle.
        unsafe { call!(self.device.driver(), cuStreamDestroy(self.raw)) }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if self.is_owned {
            self.device.after_drop(self.destroy(), || Self {
                device: self.device.clone(),
                raw: self.raw,
                is_owned: true,
                owner: None,
            });
        }
    }
}

impl Stuck for Handle {}
