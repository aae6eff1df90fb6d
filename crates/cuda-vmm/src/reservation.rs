//! Address space without memory behind it.
//!
//! # Safety
//! A [`Reservation`] owns its addresses: made by `cuMemAddressReserve`, freed once. [`Mapping`]s
//! hold an `Arc` of it, so the addresses are not freed while anything is mapped through this crate.
//!
//! [`Mapping`]: crate::Mapping
#![allow(unsafe_code)]

use crate::driver::call;
use crate::quarantine::Stuck;
use crate::{CloseError, Device, Result, VmmError, size};
use core::mem::ManuallyDrop;

/// A range of device addresses (`cuMemAddressReserve`), which costs no memory.
///
/// Dropping frees the addresses (`cuMemAddressFree`).
#[derive(Debug)]
pub struct Reservation {
    device: Device,
    address: u64,
    bytes: usize,
}

impl Reservation {
    /// Reserves `bytes` bytes, a multiple of the device's granularity.
    ///
    /// # Errors
    /// [`VmmError::ZeroSize`], [`VmmError::Misaligned`]; [`VmmError::Driver`] with
    /// `CUDA_ERROR_OUT_OF_MEMORY` if the address space has no such run (2^47 bytes are never had).
    pub fn new(device: &Device, bytes: usize) -> Result<Self> {
        Self::with_alignment(device, bytes, device.granularity_bytes())
    }

    /// As [`new`](Self::new), at a multiple of `alignment` bytes, a power of two.
    ///
    /// # Errors
    /// As [`new`](Self::new); [`VmmError::Misaligned`] for an alignment that is not a power of two.
    pub fn with_alignment(device: &Device, bytes: usize, alignment: usize) -> Result<Self> {
        size::multiple("reservation size", bytes, device.granularity_bytes())?;
        if alignment == 0 {
            return Err(VmmError::ZeroSize { what: "alignment" });
        }
        if !alignment.is_power_of_two() {
            return Err(VmmError::Misaligned {
                what: "alignment",
                value: alignment,
                required: alignment
                    .checked_next_power_of_two()
                    .unwrap_or(1 << (usize::BITS - 1)),
            });
        }
        let mut address = 0;
        // SAFETY: `address` is a valid place for the result.
        unsafe {
            call!(
                device.counted_driver(),
                cuMemAddressReserve(&mut address, bytes, alignment, 0, 0)
            )
        }?;
        crate::events::debug!(target: "cuda_vmm::driver", address, bytes, alignment, "reserved addresses");
        Ok(Self {
            device: device.clone(),
            address,
            bytes,
        })
    }

    /// Takes ownership of addresses reserved elsewhere.
    ///
    /// # Safety
    /// The range must be the whole of one reservation of this device's driver, with no other owner,
    /// and all that is mapped in it must be unmapped before the reservation is dropped.
    pub unsafe fn from_raw(device: &Device, address: u64, bytes: usize) -> Self {
        Self {
            device: device.clone(),
            address,
            bytes,
        }
    }

    /// Gives up ownership: the address and the size in bytes. The caller frees them.
    pub fn into_raw(self) -> (u64, usize) {
        let this = ManuallyDrop::new(self);
        // SAFETY: `this` is never dropped, so its device handle is moved out exactly once.
        drop(unsafe { core::ptr::read(&this.device) });
        (this.address, this.bytes)
    }

    /// The first address.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The device that it was reserved on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Frees the addresses and returns the error that dropping would hide.
    ///
    /// # Errors
    /// The driver's error with the reservation, which still owns its addresses.
    pub fn close(self) -> Result<(), CloseError<Self>> {
        match self.free() {
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

    fn free(&self) -> Result<()> {
        // SAFETY: this object owns the addresses, and mappings of this crate keep it alive, so
        // nothing of ours is mapped there any more.
        let free =
            |driver: &_| unsafe { call!(driver, cuMemAddressFree(self.address, self.bytes)) };
        self.device.give_to_driver(free)?;
        crate::events::debug!(target: "cuda_vmm::driver", address = self.address, bytes = self.bytes, "freed addresses");
        Ok(())
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.device.after_drop(self.free(), || Self {
            device: self.device.clone(),
            address: self.address,
            bytes: self.bytes,
        });
    }
}

impl Stuck for Reservation {
    fn address_bytes(&self) -> usize {
        self.bytes
    }
}
