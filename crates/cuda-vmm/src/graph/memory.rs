//! The memory that a device holds for what graphs allocate.
//!
//! # Safety
//! The driver writes one number of 64 bits for each attribute.
#![allow(unsafe_code)]

use crate::driver::call;
use crate::sys::{
    CU_GRAPH_MEM_ATTR_RESERVED_MEM_CURRENT, CU_GRAPH_MEM_ATTR_RESERVED_MEM_HIGH,
    CU_GRAPH_MEM_ATTR_USED_MEM_CURRENT, CU_GRAPH_MEM_ATTR_USED_MEM_HIGH, CUgraphMem_attribute,
};
use crate::{Device, Result};

/// The memory in bytes that a device holds for what graphs allocate, of all programs' parts that
/// use this driver in the process (`cuDeviceGetGraphMemAttribute`).
///
/// The driver takes it when a graph is launched, and keeps it for the next launch. It is on no
/// budget.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct GraphMemory {
    /// Mapped for what graphs allocate. It stays so after a launch, until it is trimmed.
    pub used_bytes: u64,
    /// The most that was mapped.
    pub used_bytes_max: u64,
    /// Held, mapped or not.
    pub reserved_bytes: u64,
    /// The most that was held.
    pub reserved_bytes_max: u64,
}

impl Device {
    /// How much memory the device holds for what graphs allocate.
    ///
    /// # Errors
    /// [`VmmError::Driver`](crate::VmmError::Driver).
    pub fn graph_memory(&self) -> Result<GraphMemory> {
        let _current = self.make_current()?;
        Ok(GraphMemory {
            used_bytes: self.graph_bytes(CU_GRAPH_MEM_ATTR_USED_MEM_CURRENT)?,
            used_bytes_max: self.graph_bytes(CU_GRAPH_MEM_ATTR_USED_MEM_HIGH)?,
            reserved_bytes: self.graph_bytes(CU_GRAPH_MEM_ATTR_RESERVED_MEM_CURRENT)?,
            reserved_bytes_max: self.graph_bytes(CU_GRAPH_MEM_ATTR_RESERVED_MEM_HIGH)?,
        })
    }

    fn graph_bytes(&self, attribute: CUgraphMem_attribute) -> Result<u64> {
        let mut bytes = 0u64;
        let place = (&raw mut bytes).cast();
        // SAFETY: the attribute is a number of 64 bits, for which `place` has room.
        unsafe {
            call!(
                self.driver(),
                cuDeviceGetGraphMemAttribute(self.raw(), attribute, place)
            )
        }?;
        Ok(bytes)
    }

    /// Gives back the memory that is held for graphs and not in use (`cuDeviceGraphMemTrim`). The
    /// next launches take it anew.
    ///
    /// # Errors
    /// [`VmmError::Driver`](crate::VmmError::Driver).
    pub fn trim_graph_memory(&self) -> Result<()> {
        let _current = self.make_current()?;
        // SAFETY: the device exists.
        unsafe { call!(self.driver(), cuDeviceGraphMemTrim(self.raw())) }
    }
}
