//! Streams, so far as memory management needs them.
//!
//! # Safety
//! A stream is alive while its [`Handle`] is; each stream here has one. All calls run with the
//! device's context current.
#![allow(unsafe_code)]

use crate::capture::Relaxed;
use crate::driver::call;
use crate::foreign::Foreign;
pub(crate) use crate::stream_handle::Handle;
use crate::sync::{Arc, Weak};
use crate::sys::{CU_STREAM_NON_BLOCKING, CUstream};
use crate::{Device, Fence, Result};
use core::any::Any;
use core::ffi::c_void;
use core::ptr::null_mut;

/// A queue of work on a device; a cheap clone.
///
/// Pools for which it is [named](crate::VirtualMemoryPool::use_stream) hold it as well, but not as
/// a clone does. When the last clone of a stream made by [`new`](Self::new) is dropped, pools let
/// it go, and it is destroyed. A handle taken by [`raw`](Self::raw) must not be used after that.
#[derive(Clone, Debug)]
pub struct Stream {
    handle: Arc<Handle>,
    /// Shared by the clones, and by nothing else.
    clones: Arc<()>,
}

/// A pool's hold on a stream that is named for it.
#[derive(Clone, Debug)]
pub(crate) struct Named {
    handle: Arc<Handle>,
    clones: Weak<()>,
}

impl Named {
    pub(crate) fn handle(&self) -> &Arc<Handle> {
        &self.handle
    }

    /// Whether no caller can queue work any more: all clones of a stream of our own are gone. It
    /// stays so.
    pub(crate) fn is_let_go(&self) -> bool {
        self.handle.is_owned && self.clones.strong_count() == 0
    }
}

impl Stream {
    /// A new stream that does not synchronise with the legacy default stream (`cuStreamCreate`).
    ///
    /// # Errors
    /// [`VmmError::Driver`](crate::VmmError::Driver),
    /// [`VmmError::Forked`](crate::VmmError::Forked).
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
        Ok(Self::from_handle(Handle {
            device: device.clone(),
            raw,
            is_owned: true,
            owner: None,
        }))
    }

    fn from_handle(handle: Handle) -> Self {
        Self {
            handle: Arc::new(handle),
            clones: Arc::default(),
        }
    }

    /// A stream that the caller owns. Null is the legacy default stream. 2 is the per-thread
    /// default stream, which is another one on each thread. A pool for which it is named waits for
    /// all work of the context instead.
    ///
    /// # Safety
    /// The stream must belong to the device's primary context and outlive every clone of the
    /// result.
    pub unsafe fn borrow(device: &Device, raw: CUstream) -> Self {
        Self::from_handle(Handle {
            device: device.clone(),
            raw,
            is_owned: false,
            owner: None,
        })
    }

    /// As [`borrow`](Self::borrow), of a stream that lives while `owner` does. The owner is held
    /// until the last clone is gone and no pool asks the stream any more. A pool for which it is
    /// named asks it until the pool [forgets](crate::VirtualMemoryPool::forget_stream) it or ends.
    /// The owner is dropped on the thread that lets it go last, with no lock held.
    ///
    /// # Safety
    /// The stream must belong to the device's primary context, and live while `owner` does.
    pub unsafe fn borrow_with(
        device: &Device,
        raw: CUstream,
        owner: std::sync::Arc<dyn Any + Send + Sync>,
    ) -> Self {
        Self::from_handle(Handle {
            device: device.clone(),
            raw,
            is_owned: false,
            owner: Some(Foreign::new(owner)),
        })
    }

    /// The hold of a pool for which it is named.
    pub(crate) fn named(&self) -> Named {
        Named {
            handle: self.handle.clone(),
            clones: Arc::downgrade(&self.clones),
        }
    }

    pub(crate) fn handle(&self) -> &Arc<Handle> {
        &self.handle
    }

    /// The driver's handle.
    pub fn raw(&self) -> CUstream {
        self.handle.raw
    }

    /// The device whose work it queues.
    pub fn device(&self) -> &Device {
        &self.handle.device
    }

    /// Whether the stream is being captured, or its capture has failed (`cuStreamIsCapturing`).
    ///
    /// # Errors
    /// [`VmmError::Driver`](crate::VmmError::Driver), also if it is the legacy default stream and
    /// another is captured.
    pub fn is_capturing(&self) -> Result<bool> {
        self.handle.is_capturing()
    }

    /// Marks everything queued so far (`cuEventRecord`).
    ///
    /// # Errors
    /// [`VmmError::Driver`](crate::VmmError::Driver).
    pub fn record(&self) -> Result<Fence> {
        Fence::on_stream(&self.handle)
    }

    /// Lets later work of this stream wait for the fence (`cuStreamWaitEvent`); the caller does
    /// not. The fence may be another device's.
    ///
    /// # Errors
    /// [`VmmError::WrongDriver`](crate::VmmError::WrongDriver);
    /// [`VmmError::Driver`](crate::VmmError::Driver).
    pub fn wait_for(&self, fence: &Fence) -> Result<()> {
        self.handle.wait_for(fence)
    }

    /// Waits for everything queued so far (`cuStreamSynchronize`).
    ///
    /// # Errors
    /// [`VmmError::Driver`](crate::VmmError::Driver), also for work that failed.
    pub fn synchronize(&self) -> Result<()> {
        let _current = self.handle.device.make_current()?;
        let _relaxed = Relaxed::new(self.handle.device.driver())?;
        // SAFETY: the stream is alive.
        unsafe {
            call!(
                self.handle.device.driver(),
                cuStreamSynchronize(self.handle.raw)
            )
        }
    }

    /// Queues setting `bytes` bytes at `address` to `value` (`cuMemsetD8Async`).
    ///
    /// # Errors
    /// [`VmmError::Driver`](crate::VmmError::Driver).
    ///
    /// # Safety
    /// The addresses must be mapped and writable until the work has run.
    pub unsafe fn memset(&self, address: u64, value: u8, bytes: usize) -> Result<()> {
        let _current = self.handle.device.make_current()?;
        // SAFETY: the caller vouches for the addresses.
        unsafe {
            call!(
                self.handle.device.driver(),
                cuMemsetD8Async(address, value, bytes, self.handle.raw)
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
        let _current = self.handle.device.make_current()?;
        // SAFETY: the caller vouches for the addresses.
        unsafe {
            call!(
                self.handle.device.driver(),
                cuMemcpyDtoDAsync(target, source, bytes, self.handle.raw)
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
            let _current = self.handle.device.make_current()?;
            // SAFETY: the slice outlives the copy, which is waited for below; the caller vouches
            // for the addresses.
            unsafe {
                call!(
                    self.handle.device.driver(),
                    cuMemcpyHtoDAsync(
                        target,
                        source.as_ptr().cast(),
                        source.len(),
                        self.handle.raw
                    )
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
        let _current = self.handle.device.make_current()?;
        // SAFETY: the copy is finished when the call returns, so the slice is not written later;
        // the caller vouches for the addresses.
        unsafe {
            call!(
                self.handle.device.driver(),
                cuMemcpyDtoH(target.as_mut_ptr().cast(), source, target.len())
            )
        }
    }
}

/// Copies between the device and pinned host memory, for this crate alone.
impl Stream {
    /// Queues a copy from device addresses to a host address (`cuMemcpyDtoHAsync`).
    ///
    /// # Safety
    /// The device addresses must be mapped, and the host's be of pinned memory that nothing else
    /// reads or writes, until the work has run.
    pub(crate) unsafe fn copy_out(&self, target: usize, source: u64, bytes: usize) -> Result<()> {
        let _current = self.handle.device.make_current()?;
        let target = core::ptr::with_exposed_provenance_mut(target);
        // SAFETY: the caller vouches for both ends.
        unsafe {
            call!(
                self.handle.device.driver(),
                cuMemcpyDtoHAsync(target, source, bytes, self.handle.raw)
            )
        }
    }

    /// Queues a copy from a host address to device addresses (`cuMemcpyHtoDAsync`).
    ///
    /// # Safety
    /// The device addresses must be mapped and writable, and the host's be of pinned memory that
    /// nothing writes, until the work has run.
    pub(crate) unsafe fn copy_in(&self, target: u64, source: usize, bytes: usize) -> Result<()> {
        let _current = self.handle.device.make_current()?;
        let source = core::ptr::with_exposed_provenance(source);
        // SAFETY: the caller vouches for both ends.
        unsafe {
            call!(
                self.handle.device.driver(),
                cuMemcpyHtoDAsync(target, source, bytes, self.handle.raw)
            )
        }
    }

    /// Queues a call of a host function (`cuLaunchHostFunc`).
    ///
    /// # Safety
    /// The function must be sound to call with `data` from any thread, whenever the stream comes to
    /// it. It must not unwind, and call no driver.
    pub(crate) unsafe fn call_host(
        &self,
        function: unsafe extern "C" fn(*mut c_void),
        data: *mut c_void,
    ) -> Result<()> {
        let _current = self.handle.device.make_current()?;
        // SAFETY: the caller vouches for the function.
        unsafe {
            call!(
                self.handle.device.driver(),
                cuLaunchHostFunc(self.handle.raw, Some(function), data)
            )
        }
    }
}

impl Handle {
    /// As [`Stream::wait_for`].
    pub(crate) fn wait_for(&self, fence: &Fence) -> Result<()> {
        if !self.device.driver().is_same(fence.device().driver()) {
            return Err(crate::VmmError::WrongDriver);
        }
        let _current = self.device.make_current()?;
        // SAFETY: stream and event are alive.
        unsafe {
            call!(
                self.device.driver(),
                cuStreamWaitEvent(self.raw, fence.raw(), 0)
            )
        }
    }
}
