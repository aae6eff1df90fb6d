//! Memory without addresses.
//!
//! # Safety
//! A [`PhysicalMemory`] owns one reference to its handle: made by `cuMemCreate` (or imported),
//! released once. The driver keeps released memory alive while it is mapped, and [`Mapping`]s hold
//! an `Arc` of it besides.
//!
//! [`Mapping`]: crate::Mapping
#![allow(unsafe_code)]

use crate::driver::call;
use crate::quarantine::Stuck;
use crate::sys::CUmemGenericAllocationHandle;
use crate::{CloseError, Device, Result, VmmError, size};
use core::mem::ManuallyDrop;

/// Physical memory of a device (`cuMemCreate`), which no address reaches until it is mapped.
///
/// Its contents are undefined until written. Dropping releases it (`cuMemRelease`).
#[derive(Debug)]
pub struct PhysicalMemory {
    device: Device,
    handle: CUmemGenericAllocationHandle,
    bytes: usize,
}

impl PhysicalMemory {
    /// Takes `bytes` bytes of the device's memory, a multiple of its granularity.
    ///
    /// # Errors
    /// [`VmmError::ZeroSize`], [`VmmError::Misaligned`]; [`VmmError::Driver`] with
    /// `CUDA_ERROR_OUT_OF_MEMORY` if the device has no such room.
    pub fn new(device: &Device, bytes: usize) -> Result<Self> {
        Self::create(device, bytes, false)
    }

    /// As [`new`](Self::new), for memory that [`export`](Self::export) can share.
    ///
    /// # Errors
    /// As [`new`](Self::new); [`VmmError::UnsupportedDevice`] if the device cannot export.
    pub fn exportable(device: &Device, bytes: usize) -> Result<Self> {
        if !device.can_export() {
            return Err(VmmError::UnsupportedDevice {
                ordinal: device.ordinal(),
            });
        }
        Self::create(device, bytes, true)
    }

    fn create(device: &Device, bytes: usize, exportable: bool) -> Result<Self> {
        size::multiple("physical size", bytes, device.granularity_bytes())?;
        let properties = device.properties(exportable);
        let mut handle = 0;
        // SAFETY: `handle` is a valid place and the properties are alive during the call.
        unsafe {
            call!(
                device.counted_driver(),
                cuMemCreate(&mut handle, bytes, &properties, 0)
            )
        }?;
        crate::events::debug!(target: "cuda_vmm::driver", handle, bytes, exportable, "created memory");
        Ok(Self {
            device: device.clone(),
            handle,
            bytes,
        })
    }

    /// Takes ownership of a handle made elsewhere.
    ///
    /// # Safety
    /// The handle must be memory of this device's driver with exactly this size in bytes, and the
    /// caller must give up one reference to it.
    pub unsafe fn from_raw(
        device: &Device,
        handle: CUmemGenericAllocationHandle,
        bytes: usize,
    ) -> Self {
        Self {
            device: device.clone(),
            handle,
            bytes,
        }
    }

    /// Gives up ownership of the handle. The caller releases it.
    pub fn into_raw(self) -> CUmemGenericAllocationHandle {
        let this = ManuallyDrop::new(self);
        // SAFETY: `this` is never dropped, so its device handle is moved out exactly once.
        drop(unsafe { core::ptr::read(&this.device) });
        this.handle
    }

    /// The driver's handle, which stays owned by this object.
    pub fn handle(&self) -> CUmemGenericAllocationHandle {
        self.handle
    }

    /// The size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The device that the memory belongs to.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Releases the memory and returns the error that dropping would hide.
    ///
    /// # Errors
    /// The driver's error with the memory, which is still owned.
    pub fn close(self) -> Result<(), CloseError<Self>> {
        match self.release() {
            Ok(()) => {
                self.into_raw();
                Ok(())
            }
            Err(error) => Err(CloseError {
                error,
                object: self,
            }),
        }
    }

    fn release(&self) -> Result<()> {
        // SAFETY: this object owns one reference to the handle and gives it up here, once.
        let release = |driver: &_| unsafe { call!(driver, cuMemRelease(self.handle)) };
        self.device.give_to_driver(release)?;
        self.device.note_memory();
        crate::events::debug!(target: "cuda_vmm::driver", handle = self.handle, bytes = self.bytes, "released memory");
        Ok(())
    }
}

impl Drop for PhysicalMemory {
    fn drop(&mut self) {
        self.device.after_drop(self.release(), || Self {
            device: self.device.clone(),
            handle: self.handle,
            bytes: self.bytes,
        });
    }
}

impl Stuck for PhysicalMemory {
    fn bytes(&self) -> usize {
        self.bytes
    }
}
