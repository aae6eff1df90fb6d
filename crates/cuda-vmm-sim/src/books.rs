//! What a device holds, counted.

/// What one device holds at a moment.
///
/// Address reservations belong to no device: `reservations` and `reserved_bytes` are those of the whole
/// simulator, whichever device is asked. The books of an [`Interposer`](crate::Interposer) are those of all devices
/// together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Books {
    /// Device memory in use, in bytes: allocation handles and plain allocations, each counted once,
    /// however often it is mapped or imported. Memory whose handle was released counts until it is
    /// unmapped.
    pub physical_bytes: usize,
    /// References to allocation handles that their owners have not released: one for each create, import
    /// and retain.
    pub handles: usize,
    /// Address reservations of the whole simulator.
    pub reservations: usize,
    /// Their sizes, in bytes.
    pub reserved_bytes: usize,
    /// Mappings of this device's memory.
    pub mappings: usize,
    /// Their sizes, in bytes; memory mapped twice counts twice.
    pub mapped_bytes: usize,
    /// Allocations by `cuMemAlloc` and `cuMemAllocAsync`.
    pub plain_allocations: usize,
    /// Their sizes, in bytes, each rounded up to a whole host page.
    pub plain_bytes: usize,
    /// Streams created and not destroyed.
    pub streams: usize,
    /// Events created and not destroyed.
    pub events: usize,
    /// Graphs and executable graphs not destroyed.
    pub graphs: usize,
    /// Retains of the primary context that were not released.
    pub context_retains: usize,
}
