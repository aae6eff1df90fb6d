//! Physical memory without addresses.
//!
//! # Safety
//! [`PhysicalMemoryHandle::from_raw`] relies on its caller's promise.
#![allow(unsafe_code)]

use crate::cuda_ffi::MemGenericAllocationHandle;
use crate::device::{core_device, default_driver};
use crate::error::Result;
use candle_core::Device;
use cuda_vmm::PhysicalMemory;

/// Physical memory of a device (`cuMemCreate`). No address reaches it until it is mapped.
///
/// Dropping it releases the memory (`cuMemRelease`). If it is mapped, the memory stays until it is
/// unmapped.
///
/// ```
/// # #[cfg(feature = "simulator")] {
/// use candle_cuda_vmm::PhysicalMemoryHandle;
///
/// let memory = PhysicalMemoryHandle::new(2 << 20, &candle_core::Device::Cpu)?;
/// assert_eq!(memory.size(), 2 << 20);
/// # }
/// # Ok::<(), candle_cuda_vmm::VmmError>(())
/// ```
#[derive(Debug)]
pub struct PhysicalMemoryHandle {
    handle: MemGenericAllocationHandle,
    size: usize,
    device_ordinal: i32,
    /// `None` for a raw handle whose device could not be opened. It is not released.
    memory: Option<PhysicalMemory>,
}

impl PhysicalMemoryHandle {
    /// Allocates `size` bytes of the device's memory, a multiple of its granularity.
    ///
    /// # Errors
    /// - [`Vmm`](crate::VmmError::Vmm) with `ZeroSize` if `size` is 0.
    /// - [`InvalidAlignment`](crate::VmmError::InvalidAlignment) unless `size` is a multiple of the
    ///   granularity.
    /// - [`Vmm`](crate::VmmError::Vmm) if a driver call fails;
    ///   [`is_out_of_memory`](crate::VmmError::is_out_of_memory) returns `true` if the device has
    ///   too little memory.
    /// - Any error of [`core_device`].
    pub fn new(size: usize, device: &Device) -> Result<Self> {
        let device = core_device(device)?;
        let memory = PhysicalMemory::new(&device, size)?;
        Ok(Self {
            handle: memory.handle(),
            size,
            device_ordinal: device.ordinal() as i32,
            memory: Some(memory),
        })
    }

    /// Takes ownership of a handle of the [default driver](default_driver).
    ///
    /// If that driver has no such device, the handle can be read but is not released.
    ///
    /// # Safety
    /// The handle is memory of that device and of exactly `size` bytes. The caller gives up one
    /// reference to it.
    pub unsafe fn from_raw(
        handle: MemGenericAllocationHandle,
        size: usize,
        device_ordinal: i32,
    ) -> Self {
        let device = usize::try_from(device_ordinal)
            .ok()
            .and_then(|ordinal| default_driver().ok()?.device(ordinal).ok());
        // SAFETY: the core requires the same of its caller.
        let memory =
            device.map(|device| unsafe { PhysicalMemory::from_raw(&device, handle, size) });
        Self {
            handle,
            size,
            device_ordinal,
            memory,
        }
    }

    /// Returns the size in bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Returns the device's number.
    pub fn device_ordinal(&self) -> i32 {
        self.device_ordinal
    }

    /// Returns the driver's handle. This object still owns it: do not release it.
    pub fn as_raw(&self) -> MemGenericAllocationHandle {
        self.handle
    }

    /// Gives up ownership of the handle and returns it.
    ///
    /// The caller releases it, for example with [`mem_release`](crate::cuda_ffi::mem_release).
    pub fn into_raw(self) -> MemGenericAllocationHandle {
        match self.memory {
            Some(memory) => memory.into_raw(),
            None => self.handle,
        }
    }

    pub(crate) fn memory(&self) -> Option<&PhysicalMemory> {
        self.memory.as_ref()
    }
}
