//! The work that streams run: memsets, copies, host functions, frees and markers.

use crate::CostModel;
use std::ffi::c_void;

/// A part of a range of addresses that lies in one mapping.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) mapping_address: u64,
    pub(crate) mapping_id: u64,
    pub(crate) address: u64,
    pub(crate) bytes: usize,
}

/// A range of addresses, and its mappings when the work was enqueued.
#[derive(Clone, Debug)]
pub(crate) struct ResolvedRange {
    pub(crate) segments: Vec<Segment>,
    /// Whether all of it was mapped.
    pub(crate) is_mapped: bool,
}

/// One side of a copy.
#[derive(Debug)]
pub(crate) enum ResolvedEndpoint {
    Device(ResolvedRange),
    Host(usize),
    /// Bytes that were read from the host when the copy was enqueued.
    Staged(Box<[u8]>),
}

/// A piece of work.
#[derive(Debug)]
pub(crate) enum Work {
    Nothing,
    Memset {
        target: ResolvedRange,
        value: u8,
        bytes: usize,
    },
    Copy {
        to: ResolvedEndpoint,
        from: ResolvedEndpoint,
        bytes: usize,
    },
    HostFunction {
        function: unsafe extern "C" fn(*mut c_void),
        data: usize,
    },
    Record {
        event: u64,
        record: u64,
    },
    /// No work: it only completes after the work before it.
    Wait {
        clock_ns: u64,
    },
    /// Frees a plain allocation.
    Free {
        address: u64,
    },
    /// Lets later work use an allocation of a graph, or no more.
    Open {
        address: u64,
        open: bool,
    },
}

impl Work {
    /// Returns whether this is a marker, which needs no thread.
    pub(crate) fn is_marker(&self) -> bool {
        matches!(
            self,
            Self::Nothing | Self::Record { .. } | Self::Wait { .. }
        )
    }

    /// Returns the same marker for another stream.
    pub(crate) fn clone_marker(&self) -> Self {
        match *self {
            Self::Record { event, record } => Self::Record { event, record },
            Self::Wait { clock_ns } => Self::Wait { clock_ns },
            _ => Self::Nothing,
        }
    }

    /// Returns the calling thread's cost of enqueueing this, in virtual nanoseconds.
    pub(crate) fn launch_ns(&self, cost: &CostModel) -> u64 {
        match self {
            Self::Memset { .. } | Self::Copy { .. } | Self::HostFunction { .. } => cost.launch_ns,
            _ => 0,
        }
    }

    /// Returns how long this occupies its stream, in virtual nanoseconds.
    pub(crate) fn duration_ns(&self, cost: &CostModel) -> u64 {
        let (bytes, speed) = match self {
            Self::Memset { bytes, .. } => (*bytes, cost.device_bytes_per_ns),
            Self::Copy {
                to: ResolvedEndpoint::Device(_),
                from: ResolvedEndpoint::Device(_),
                bytes,
            } => (*bytes, cost.device_bytes_per_ns),
            Self::Copy { bytes, .. } => (*bytes, cost.host_bytes_per_ns),
            _ => return 0,
        };
        (bytes as f64 / speed) as u64
    }
}
