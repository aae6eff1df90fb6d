//! The addresses of one allocation node of a graph.

use crate::host_memory::HostRange;

/// The addresses of one allocation node.
#[derive(Debug)]
pub(crate) struct GraphRange {
    /// The number of the capture that it belongs to.
    pub(crate) capture: u64,
    /// Whether the launches and frees so far leave it allocated.
    pub(crate) is_allocated: bool,
    /// Whether its own graph frees it.
    pub(crate) is_freed_inside: bool,
    /// Its memory, from the first launch.
    pub(crate) host: Option<HostRange>,
}
