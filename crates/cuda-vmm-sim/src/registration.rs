//! The calls that register host memory.
//!
//! Copies between a device and registered memory do not wait, and read and write it when they run
//! (`launch`). The simulator keeps no memory resident: it only keeps the books.

use crate::state::{DriverResult, State};
use cuda_vmm_sys::*;

/// All flags that there are.
const FLAGS: u32 = CU_MEMHOSTREGISTER_PORTABLE
    | CU_MEMHOSTREGISTER_DEVICEMAP
    | CU_MEMHOSTREGISTER_IOMEMORY
    | CU_MEMHOSTREGISTER_READ_ONLY;

/// The flags for memory of other devices and for memory that a device may only read.
const UNSUPPORTED_FLAGS: u32 = CU_MEMHOSTREGISTER_IOMEMORY | CU_MEMHOSTREGISTER_READ_ONLY;

impl State {
    /// `cuMemHostRegister`. As a call that allocates, it is unsafe while a stream is captured.
    pub(crate) fn host_register(&self, address: usize, bytes: usize, flags: u32) -> DriverResult {
        let mut inner = self.lock();
        let device = inner.enter()?;
        inner.unsafe_call()?;
        if address == 0 || bytes == 0 || flags & !FLAGS != 0 {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        if flags & UNSUPPORTED_FLAGS != 0 {
            return Err(CUDA_ERROR_NOT_SUPPORTED);
        }
        inner.registrations.add(device, address, bytes)
    }

    /// `cuMemHostUnregister`. Any context may unregister what another has registered, and none need
    /// be current.
    pub(crate) fn host_unregister(&self, address: usize) -> DriverResult {
        let mut inner = self.lock();
        match inner.enter() {
            Ok(_) | Err(CUDA_ERROR_INVALID_CONTEXT) => {}
            Err(error) => return Err(error),
        }
        inner.unsafe_call()?;
        if address == 0 {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        inner.registrations.remove(address)
    }
}
