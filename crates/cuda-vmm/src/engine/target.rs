//! The addresses of a range, to map memory there.

use crate::mapping::MapFailure;
use crate::sync::Arc;
use crate::{Access, Device, Mapping, PhysicalMemory, Reservation};

/// What is needed of a range to map memory there, without the lock.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) reservation: Arc<Reservation>,
    pub(crate) access: Arc<[(Device, Access)]>,
    pub(crate) page_bytes: usize,
}

impl Target {
    /// Maps memory at the addresses that begin with a page.
    pub(crate) fn map(
        &self,
        first: usize,
        memory: &Arc<PhysicalMemory>,
    ) -> Result<Mapping, MapFailure> {
        let offset = first * self.page_bytes;
        Mapping::try_new(&self.reservation, offset, memory, &self.access)
    }
}
