//! Sharing physical memory between processes, as a file descriptor.
//!
//! # Safety
//! The driver hands out a new descriptor on export, which an [`OwnedFd`] then owns, and duplicates
//! the one given on import, which stays the caller's.
#![allow(unsafe_code)]

use crate::driver::call;
use crate::sys::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR as DESCRIPTOR;
use crate::{Device, PhysicalMemory, Result, VmmError, size};
use core::ffi::{c_int, c_void};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

impl PhysicalMemory {
    /// A file descriptor that names this memory (`cuMemExportToShareableHandle`).
    ///
    /// Send it to another process over a Unix socket. A process that imports it keeps the memory
    /// alive by itself.
    ///
    /// # Errors
    /// [`VmmError::Driver`](crate::VmmError::Driver), also for memory that was not made by
    /// [`exportable`](Self::exportable).
    pub fn export(&self) -> Result<OwnedFd> {
        let mut descriptor: c_int = -1;
        // SAFETY: for this handle type the result is an `int`, and `descriptor` is a place for one.
        unsafe {
            call!(
                self.device().driver(),
                cuMemExportToShareableHandle(
                    (&raw mut descriptor).cast::<c_void>(),
                    self.handle(),
                    DESCRIPTOR,
                    0,
                )
            )
        }?;
        crate::events::debug!(target: "cuda_vmm::driver", handle = self.handle(), descriptor, "exported memory");
        // SAFETY: the driver opened this descriptor for us, and nothing else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
    }

    /// Memory of `bytes` bytes that another process exported (`cuMemImportFromShareableHandle`).
    ///
    /// # Errors
    /// [`VmmError::ZeroSize`](crate::VmmError::ZeroSize),
    /// [`VmmError::Misaligned`](crate::VmmError::Misaligned);
    /// [`VmmError::Driver`](crate::VmmError::Driver) if the descriptor is no exported memory;
    /// [`VmmError::Descriptor`] if descriptor 0 could not be duplicated.
    ///
    /// # Safety
    /// `bytes` must be the size with which the memory was made, and `device` the device it is on:
    /// the descriptor does not tell.
    pub unsafe fn import(
        device: &Device,
        descriptor: BorrowedFd<'_>,
        bytes: usize,
    ) -> Result<Self> {
        size::multiple("physical size", bytes, device.granularity_bytes())?;
        // The driver takes the descriptor in place of a pointer and refuses null, which is standard
        // input. A duplicate never has that number.
        let duplicate = match descriptor.as_raw_fd() {
            0 => Some(
                descriptor
                    .try_clone_to_owned()
                    .map_err(|error| VmmError::Descriptor {
                        descriptor: 0,
                        reason: error.to_string(),
                    })?,
            ),
            _ => None,
        };
        let descriptor = duplicate.as_ref().map_or(descriptor, AsFd::as_fd);
        let mut handle = 0;
        // SAFETY: for this handle type the descriptor itself is passed in place of a pointer.
        unsafe {
            call!(
                device.driver(),
                cuMemImportFromShareableHandle(
                    &mut handle,
                    descriptor.as_raw_fd() as usize as *mut c_void,
                    DESCRIPTOR,
                )
            )
        }?;
        crate::events::debug!(target: "cuda_vmm::driver", handle, bytes, "imported memory");
        // SAFETY: the import made a reference that is ours; the caller vouches for size and device.
        Ok(unsafe { Self::from_raw(device, handle, bytes) })
    }
}
