//! A piece: host memory that is registered with the driver.
//!
//! # Safety
//! A [`Piece`] owns its memory, and one registration of it: made by `cuMemHostRegister` over the
//! whole of the memory, ended once. Memory that is registered is never unmapped: other memory could
//! come to its addresses, and the driver would take it for the old. What uses a piece's memory ends
//! before the piece does, which the store's books see to.
#![allow(unsafe_code)]

use super::host_memory::HostMemory;
use crate::capture::Relaxed;
use crate::driver::call;
use crate::quarantine::Stuck;
use crate::sys::CU_MEMHOSTREGISTER_PORTABLE;
use crate::{Device, Result, VmmError};

/// Registered host memory. Dropping it unregisters it (`cuMemHostUnregister`) and unmaps it.
#[derive(Debug)]
pub(super) struct Piece {
    device: Device,
    /// `None` after [`close`](Self::close).
    memory: Option<HostMemory>,
}

impl Piece {
    /// Makes memory of `bytes` bytes and registers it for all contexts. If a step fails, what was
    /// done before it is undone.
    pub(super) fn new(device: &Device, bytes: usize, threads: usize) -> Result<Self> {
        // Before the dear part, so that a driver that cannot be used is told from the start.
        device.driver().check_process()?;
        let memory = HostMemory::new(bytes, threads)?;
        let _current = device.make_current()?;
        let _relaxed = Relaxed::new(device.driver())?;
        let address = core::ptr::with_exposed_provenance_mut(memory.address());
        // SAFETY: the memory is mapped and readable and writable, whole, and stays so until it is
        // unregistered.
        unsafe {
            call!(
                device.counted_driver(),
                cuMemHostRegister(address, bytes, CU_MEMHOSTREGISTER_PORTABLE)
            )
        }?;
        crate::events::debug!(target: "cuda_vmm::driver", bytes, "registered host memory");
        Ok(Self {
            device: device.clone(),
            memory: Some(memory),
        })
    }

    /// The first address; a multiple of 2 MiB.
    pub(super) fn address(&self) -> usize {
        self.memory.as_ref().map_or(0, HostMemory::address)
    }

    pub(super) fn bytes(&self) -> usize {
        self.memory.as_ref().map_or(0, HostMemory::bytes)
    }

    /// Gives the memory back, or returns the driver's error with the piece, which is as it was.
    pub(super) fn close(mut self) -> Result<(), (VmmError, Self)> {
        match self.unregister() {
            Ok(()) => {
                self.memory = None;
                Ok(())
            }
            Err(error) => Err((error, self)),
        }
    }

    fn unregister(&self) -> Result<()> {
        let _current = self.device.make_current()?;
        let _relaxed = Relaxed::new(self.device.driver())?;
        let address = core::ptr::with_exposed_provenance_mut(self.address());
        // SAFETY: this object owns the registration that begins here, and ends it here, once.
        let unregister = |driver: &_| unsafe { call!(driver, cuMemHostUnregister(address)) };
        self.device.give_to_driver(unregister)?;
        crate::events::debug!(target: "cuda_vmm::driver", bytes = self.bytes(), "unregistered host memory");
        Ok(())
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        if self.memory.is_none() {
            return;
        }
        let outcome = self.unregister();
        let Some(memory) = self.memory.take() else {
            return;
        };
        match outcome {
            Ok(()) => drop(memory),
            // A forked process has not inherited it.
            Err(VmmError::Forked) => memory.leave(),
            // The driver never forgets the addresses, and nothing runs any more that uses them.
            Err(error) if error.is_poisoned() => memory.abandon(),
            Err(error) => {
                let device = self.device.clone();
                let memory = Some(memory);
                self.device.keep(Self { device, memory }, Some(&error));
            }
        }
    }
}

impl Stuck for Piece {
    fn host_bytes(&self) -> usize {
        self.bytes()
    }
}
