//! The resources that a device holds.

/// The resources that one device holds at one moment.
///
/// Address reservations belong to no device: `reservations` and `reserved_bytes` are those of the
/// whole simulator. The books of an [`Interposer`](crate::Interposer) are the sum over all devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Books {
    /// Device memory in use, in bytes: allocation handles, plain allocations, and what a simulated
    /// device reserves for its graphs' allocations.
    ///
    /// Memory that is mapped or imported several times counts once. Memory whose handle was
    /// released counts until it is unmapped.
    pub physical_bytes: usize,
    /// References to allocation handles that were not released. Each create, import and retain adds
    /// one.
    pub handles: usize,
    /// Address reservations of the whole simulator.
    pub reservations: usize,
    /// Total size of the reservations, in bytes.
    pub reserved_bytes: usize,
    /// Mappings of this device's memory.
    pub mappings: usize,
    /// Total size of the mappings, in bytes. Memory that is mapped twice counts twice.
    pub mapped_bytes: usize,
    /// Allocations by `cuMemAlloc` and `cuMemAllocAsync`.
    pub plain_allocations: usize,
    /// Total size of the plain allocations, in bytes, each rounded up to a host page.
    pub plain_bytes: usize,
    /// Ranges of host memory that are registered, by the context of this device.
    pub host_registrations: usize,
    /// Total size of the registered ranges, in bytes.
    pub host_registered_bytes: usize,
    /// Streams that were created and not destroyed.
    pub streams: usize,
    /// Events that were created and not destroyed.
    pub events: usize,
    /// Graphs and executable graphs that were not destroyed.
    pub graphs: usize,
    /// Retains of the primary context that were not released.
    pub context_retains: usize,
}
