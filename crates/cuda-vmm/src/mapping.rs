//! Memory at an address.
//!
//! # Safety
//! A [`Mapping`] owns the whole of one mapping, keeps its reservation and its memory alive, and
//! unmaps once. Unmapping waits for nothing. The owner makes sure that the device has finished with
//! the addresses. The owner is the engine, or a caller that wrote through an address, which is
//! unsafe.
#![allow(unsafe_code)]

use crate::driver::call;
use crate::quarantine::Stuck;
use crate::sync::{Arc, thread};
use crate::sys::{self, CUmemAccess_flags, CUmemAccessDesc};
use crate::{
    CloseError, Device, Fence, PhysicalMemory, Reservation, Result, Stream, VmmError, size,
};
use core::mem::ManuallyDrop;
use core::time::Duration;

/// How long to wait before access is set again, if the driver was not ready to (seen on WSL 2).
const NOT_READY_PAUSES: [Duration; 4] = [
    Duration::from_millis(1),
    Duration::from_millis(2),
    Duration::from_millis(4),
    Duration::from_millis(8),
];

/// What a device may do with mapped memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// Nothing.
    None,
    /// Read.
    Read,
    /// Read and write.
    ReadWrite,
}

impl Access {
    fn flags(self) -> CUmemAccess_flags {
        match self {
            Self::None => sys::CU_MEM_ACCESS_FLAGS_PROT_NONE,
            Self::Read => sys::CU_MEM_ACCESS_FLAGS_PROT_READ,
            Self::ReadWrite => sys::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        }
    }
}

/// One physical allocation, mapped whole at an offset of a reservation (`cuMemMap`), accessible to
/// the devices that were named (`cuMemSetAccess`).
///
/// Dropping unmaps (`cuMemUnmap`). That does not wait for the device: work that still uses the
/// addresses then fails with an illegal access and takes the context with it. A caller that
/// launches such work waits for it first, or lets an [`Engine`](crate::Engine) do so.
#[derive(Debug)]
pub struct Mapping {
    reservation: Arc<Reservation>,
    memory: Arc<PhysicalMemory>,
    offset: usize,
}

/// A mapping that failed to come about, with what could not be undone.
pub(crate) struct MapFailure {
    pub(crate) error: VmmError,
    /// Still mapped: access was refused, and then the unmapping too.
    pub(crate) stuck: Option<Mapping>,
}

impl Mapping {
    /// Maps all of `memory` at `offset` bytes into the reservation, accessible as `access` says.
    ///
    /// # Errors
    /// [`VmmError::WrongDriver`]; [`VmmError::Misaligned`], [`VmmError::OutOfRange`],
    /// [`VmmError::Overflow`]; [`VmmError::Driver`] if something is mapped there already or the
    /// driver is out of memory, which it may notice as late as when access is set. Nothing stays
    /// mapped.
    pub fn new(
        reservation: &Arc<Reservation>,
        offset: usize,
        memory: &Arc<PhysicalMemory>,
        access: &[(Device, Access)],
    ) -> Result<Self> {
        // What is stuck is dropped here: it tries once more, then goes to the device's quarantine.
        Self::try_new(reservation, offset, memory, access).map_err(|failure| failure.error)
    }

    pub(crate) fn try_new(
        reservation: &Arc<Reservation>,
        offset: usize,
        memory: &Arc<PhysicalMemory>,
        access: &[(Device, Access)],
    ) -> Result<Self, MapFailure> {
        let mapping = Self::map(reservation, offset, memory)
            .map_err(|error| MapFailure { error, stuck: None })?;
        match mapping.set_access(access) {
            Ok(()) => Ok(mapping),
            Err(error) => Err(MapFailure {
                error,
                stuck: mapping.unmap().err().map(|failure| failure.object),
            }),
        }
    }

    fn map(
        reservation: &Arc<Reservation>,
        offset: usize,
        memory: &Arc<PhysicalMemory>,
    ) -> Result<Self> {
        let device = reservation.device();
        if !device.driver().is_same(memory.device().driver()) {
            return Err(VmmError::WrongDriver);
        }
        size::Extent::new(offset, memory.bytes(), reservation.bytes())?;
        if offset != 0 {
            size::multiple("mapping offset", offset, device.granularity_bytes())?;
        }
        let address = reservation.address() + offset as u64;
        // SAFETY: the addresses lie inside a reservation that the mapping keeps alive, and the
        // handle is owned by the memory that it keeps alive too.
        unsafe {
            call!(
                device.counted_driver(),
                cuMemMap(address, memory.bytes(), 0, memory.handle(), 0)
            )
        }?;
        crate::events::debug!(target: "cuda_vmm::driver", address, bytes = memory.bytes(), handle = memory.handle(), "mapped");
        Ok(Self {
            reservation: reservation.clone(),
            memory: memory.clone(),
            offset,
        })
    }

    /// Sets what each device named may do with the memory (`cuMemSetAccess`). Devices not named
    /// keep what they had. If the driver is not ready (`CUDA_ERROR_NOT_READY`), it is asked four
    /// times more, within 15 ms.
    ///
    /// # Errors
    /// [`VmmError::ZeroSize`] if no device is named; [`VmmError::WrongDriver`];
    /// [`VmmError::Driver`].
    pub fn set_access(&self, access: &[(Device, Access)]) -> Result<()> {
        if access.is_empty() {
            return Err(VmmError::ZeroSize {
                what: "list of devices with access",
            });
        }
        let mut descriptors = Vec::with_capacity(access.len());
        for (device, access) in access {
            if !device.driver().is_same(self.device().driver()) {
                return Err(VmmError::WrongDriver);
            }
            descriptors.push(CUmemAccessDesc {
                location: device.properties(false).location,
                flags: access.flags(),
            });
        }
        let set = || {
            // SAFETY: the range is exactly this mapping, and the descriptors are alive during the
            // call.
            unsafe {
                call!(
                    self.device().counted_driver(),
                    cuMemSetAccess(
                        self.address(),
                        self.bytes(),
                        descriptors.as_ptr(),
                        descriptors.len(),
                    )
                )
            }
        };
        let is_not_ready = |outcome: &Result<()>| {
            let error = outcome.as_ref().err();
            error.and_then(VmmError::driver_code) == Some(sys::CUDA_ERROR_NOT_READY)
        };
        let mut outcome = set();
        for pause in NOT_READY_PAUSES {
            if !is_not_ready(&outcome) {
                break;
            }
            thread::sleep(pause);
            outcome = set();
        }
        outcome?;
        crate::events::debug!(target: "cuda_vmm::driver", address = self.address(), bytes = self.bytes(), devices = access.len(), "set access");
        Ok(())
    }

    /// Queues zeros over all of it; the fence says when they are written. No live bytes are in it,
    /// and the owner unmaps it only when the fence is past.
    pub(crate) fn scrub(&self, stream: &Stream) -> Result<Fence> {
        // SAFETY: the range is exactly this mapping, which its one caller, the engine, keeps until
        // the fence is past.
        unsafe { stream.memset(self.address(), 0, self.bytes()) }?;
        stream.record()
    }

    /// The first address.
    pub fn address(&self) -> u64 {
        self.reservation.address() + self.offset as u64
    }

    /// Where in the reservation it starts, in bytes.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// The size in bytes.
    pub fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    /// The reservation that it lies in.
    pub fn reservation(&self) -> &Arc<Reservation> {
        &self.reservation
    }

    /// The memory behind it.
    pub fn memory(&self) -> &Arc<PhysicalMemory> {
        &self.memory
    }

    fn device(&self) -> &Device {
        self.reservation.device()
    }

    /// Unmaps, drops the reservation and the memory, and returns the error that dropping would
    /// hide.
    ///
    /// # Errors
    /// The driver's error with the mapping, which is still in place.
    pub fn close(self) -> Result<(), CloseError<Self>> {
        self.unmap().map(drop)
    }

    /// Unmaps and hands over the memory.
    pub(crate) fn unmap(self) -> Result<Arc<PhysicalMemory>, CloseError<Self>> {
        match self.unmap_in_place() {
            Ok(()) => {
                let this = ManuallyDrop::new(self);
                // SAFETY: `this` is never dropped, so each field is moved out exactly once.
                unsafe {
                    drop(core::ptr::read(&this.reservation));
                    Ok(core::ptr::read(&this.memory))
                }
            }
            Err(error) => Err(CloseError {
                error,
                object: self,
            }),
        }
    }

    fn unmap_in_place(&self) -> Result<()> {
        // SAFETY: the range is exactly this mapping, which is undone once.
        let unmap = |driver: &_| unsafe { call!(driver, cuMemUnmap(self.address(), self.bytes())) };
        self.device().give_to_driver(unmap)?;
        crate::events::debug!(target: "cuda_vmm::driver", address = self.address(), bytes = self.bytes(), "unmapped");
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.device().after_drop(self.unmap_in_place(), || Self {
            reservation: self.reservation.clone(),
            memory: self.memory.clone(),
            offset: self.offset,
        });
    }
}

impl Stuck for Mapping {
    fn bytes(&self) -> usize {
        self.memory.bytes()
    }
}
