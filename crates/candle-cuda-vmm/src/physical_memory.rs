//! Memory without addresses.
//!
//! # Safety
//! A handle taken over by [`PhysicalMemoryHandle::from_raw`] is what its caller promised.
#![allow(unsafe_code)]

use crate::cuda_ffi::MemGenericAllocationHandle;
use crate::device::{core_device, default_driver};
use crate::error::Result;
use candle_core::Device;
use cuda_vmm::PhysicalMemory;

/// Physical memory of a device (`cuMemCreate`), which no address reaches until it is mapped.
///
/// Dropping releases it (`cuMemRelease`); where it is mapped it stays until it is unmapped.
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
    /// `None` for a raw handle of a device that could not be opened, which nobody could release.
    memory: Option<PhysicalMemory>,
}

impl PhysicalMemoryHandle {
    /// Takes `size` bytes of the device's memory, a multiple of its granularity.
    ///
    /// # Errors
    /// - [`Vmm`](crate::VmmError::Vmm) with `ZeroSize` if `size` is 0.
    /// - [`InvalidAlignment`](crate::VmmError::InvalidAlignment) unless it is a multiple of the
    ///   granularity.
    /// - [`Vmm`](crate::VmmError::Vmm) if a driver call fails; it
    ///   [`is_out_of_memory`](crate::VmmError::is_out_of_memory) where the device has no such room.
    /// - What [`core_device`] returns for the device.
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

    /// Takes over a handle of the [default driver](default_driver).
    ///
    /// If that driver has no such device, the handle can be read but is not released.
    ///
    /// # Safety
    /// The handle is memory of that device with exactly this size in bytes, and the caller gives up one
    /// reference to it.
    pub unsafe fn from_raw(
        handle: MemGenericAllocationHandle,
        size: usize,
        device_ordinal: i32,
    ) -> Self {
        let device = usize::try_from(device_ordinal)
            .ok()
            .and_then(|ordinal| default_driver().ok()?.device(ordinal).ok());
        // SAFETY: what the caller promises is what the core asks for.
        let memory =
            device.map(|device| unsafe { PhysicalMemory::from_raw(&device, handle, size) });
        Self {
            handle,
            size,
            device_ordinal,
            memory,
        }
    }

    /// Size in bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Number of the device.
    pub fn device_ordinal(&self) -> i32 {
        self.device_ordinal
    }

    /// The driver's handle, which stays owned by this object: do not release it.
    pub fn as_raw(&self) -> MemGenericAllocationHandle {
        self.handle
    }

    /// Gives up ownership of the handle. The caller releases it, with
    /// [`mem_release`](crate::cuda_ffi::mem_release) for one.
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
