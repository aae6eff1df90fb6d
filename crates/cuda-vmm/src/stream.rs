//! Streams, so far as memory management needs them.
//!
//! # Safety
//! A [`Stream`] either owns its stream, created here and destroyed once with its last clone, or borrows
//! one whose owner promised to outlive it. All calls run with the device's context current.
#![allow(unsafe_code)]

use crate::capture::Relaxed;
use crate::driver::call;
use crate::quarantine::{self, Stuck};
use crate::sync::Arc;
use crate::sys::{CU_STREAM_CAPTURE_STATUS_NONE, CU_STREAM_NON_BLOCKING, CUstream};
use crate::{Device, Fence, Result};
use core::ptr::null_mut;

/// A queue of work on a device; a cheap clone.
#[derive(Clone, Debug)]
pub struct Stream(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    device: Device,
    raw: CUstream,
    owned: bool,
}

// SAFETY: the stream is used through the driver's calls only, which may be made from any thread.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Stream {
    /// A new stream that does not synchronise with the legacy default stream (`cuStreamCreate`).
    ///
    /// # Errors
    /// [`VmmError::Driver`](crate::VmmError::Driver), [`VmmError::Forked`](crate::VmmError::Forked).
    pub fn new(device: &Device) -> Result<Self> {
        let _current = device.make_current()?;
        let mut raw = null_mut();
        // SAFETY: `raw` is a valid place, and the context is current.
        unsafe {
            call!(
                device.driver(),
                cuStreamCreate(&mut raw, CU_STREAM_NON_BLOCKING as _)
            )
        }?;
        Ok(Self(Arc::new(Inner {
            device: device.clone(),
            raw,
            owned: true,
        })))
    }

    /// A stream that someone else owns. Null is the legacy default stream. 2 is the per-thread default stream, of
    /// whichever thread uses it: a pool for which it is named waits for all work of the context instead.
    ///
    /// # Safety
    /// The stream must belong to the device's primary context and outlive every clone of the result.
    pub unsafe fn borrow(device: &Device, raw: CUstream) -> Self {
        Self(Arc::new(Inner {
            device: device.clone(),
            raw,
            owned: false,
        }))
    }

    /// The driver's handle.
    pub fn raw(&self) -> CUstream {
        self.0.raw
    }

    /// The device whose work it queues.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// Whether the handle stands for each thread's own default stream.
    pub(crate) fn is_per_thread(&self) -> bool {
        self.0.raw.addr() == 2
    }

    /// Whether the stream is being captured, or its capture has failed (`cuStreamIsCapturing`).
    ///
    /// # Errors
    /// [`VmmError::Driver`](crate::VmmError::Driver), also where it is the legacy default stream and another is captured.
    pub fn is_capturing(&self) -> Result<bool> {
        let _current = self.0.device.make_current()?;
        let mut status = CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: `status` is a valid place and the stream alive.
        unsafe {
            call!(
                self.0.device.driver(),
                cuStreamIsCapturing(self.0.raw, &mut status)
            )
        }?;
        Ok(status != CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// Marks everything queued so far (`cuEventRecord`).
    ///
    /// # Errors
    /// [`VmmError::Driver`](crate::VmmError::Driver).
    pub fn record(&self) -> Result<Fence> {
        // SAFETY: the stream is alive while `self` is.
        unsafe { Fence::on_stream(&self.0.device, self.0.raw) }
    }

    /// Lets later work of this stream wait for the fence (`cuStreamWaitEvent`); the caller does not.
    /// The fence may be another device's.
    ///
    /// # Errors
    /// [`VmmError::WrongDriver`](crate::VmmError::WrongDriver);
    /// [`VmmError::Driver`](crate::VmmError::Driver).
    pub fn wait_for(&self, fence: &Fence) -> Result<()> {
        if !self.0.device.driver().is_same(fence.device().driver()) {
            return Err(crate::VmmError::WrongDriver);
        }
        let _current = self.0.device.make_current()?;
        // SAFETY: stream and event are alive.
        unsafe {
            call!(
                self.0.device.driver(),
                cuStreamWaitEvent(self.0.raw, fence.raw(), 0)
            )
        }
    }

    /// Waits for everything queued so far (`cuStreamSynchronize`).
    ///
    /// # Errors
    /// [`VmmError::Driver`](crate::VmmError::Driver), also for work that failed.
    pub fn synchronize(&self) -> Result<()> {
        let _current = self.0.device.make_current()?;
        let _relaxed = Relaxed::new(self.0.device.driver())?;
        // SAFETY: the stream is alive.
        unsafe { call!(self.0.device.driver(), cuStreamSynchronize(self.0.raw)) }
    }

    /// Queues setting `bytes` bytes at `address` to `value` (`cuMemsetD8Async`).
    ///
    /// # Errors
    /// [`VmmError::Driver`](crate::VmmError::Driver).
    ///
    /// # Safety
    /// The addresses must be mapped and writable until the work has run.
    pub unsafe fn memset(&self, address: u64, value: u8, bytes: usize) -> Result<()> {
        let _current = self.0.device.make_current()?;
        // SAFETY: the caller vouches for the addresses.
        unsafe {
            call!(
                self.0.device.driver(),
                cuMemsetD8Async(address, value, bytes, self.0.raw)
            )
        }
    }

    /// Queues a copy between device addresses (`cuMemcpyDtoDAsync`).
    ///
    /// # Errors
    /// [`VmmError::Driver`](crate::VmmError::Driver).
    ///
    /// # Safety
    /// Both ranges must be mapped, the target writable, until the work has run.
    pub unsafe fn copy(&self, target: u64, source: u64, bytes: usize) -> Result<()> {
        let _current = self.0.device.make_current()?;
        // SAFETY: the caller vouches for the addresses.
        unsafe {
            call!(
                self.0.device.driver(),
                cuMemcpyDtoDAsync(target, source, bytes, self.0.raw)
            )
        }
    }

    /// Copies `source` to device addresses and waits for it (`cuMemcpyHtoDAsync`).
    ///
    /// # Errors
    /// [`VmmError::Driver`](crate::VmmError::Driver).
    ///
    /// # Safety
    /// The addresses must be mapped and writable.
    pub unsafe fn write(&self, target: u64, source: &[u8]) -> Result<()> {
        {
            let _current = self.0.device.make_current()?;
            // SAFETY: the slice outlives the copy, which is waited for below; the caller vouches for
            // the addresses.
            unsafe {
                call!(
                    self.0.device.driver(),
                    cuMemcpyHtoDAsync(target, source.as_ptr().cast(), source.len(), self.0.raw)
                )
            }?;
        }
        self.synchronize()
    }

    /// Waits for the stream, then copies from device addresses into `target` (`cuMemcpyDtoH`).
    ///
    /// # Errors
    /// [`VmmError::Driver`](crate::VmmError::Driver).
    ///
    /// # Safety
    /// The addresses must be mapped.
    pub unsafe fn read(&self, source: u64, target: &mut [u8]) -> Result<()> {
        self.synchronize()?;
        let _current = self.0.device.make_current()?;
        // SAFETY: the copy is finished when the call returns, so the slice is not written later; the
        // caller vouches for the addresses.
        unsafe {
            call!(
                self.0.device.driver(),
                cuMemcpyDtoH(target.as_mut_ptr().cast(), source, target.len())
            )
        }
    }
}

impl Inner {
    fn destroy(&self) -> Result<()> {
        let _current = self.device.make_current()?;
        // SAFETY: destroys the stream that `new` made; once it worked, nobody has it any more.
        unsafe { call!(self.device.driver(), cuStreamDestroy(self.raw)) }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.owned {
            quarantine::after_drop(&self.device, self.destroy(), || {
                Stuck::Stream(Stream(Arc::new(Self {
                    device: self.device.clone(),
                    ..*self
                })))
            });
        }
    }
}
