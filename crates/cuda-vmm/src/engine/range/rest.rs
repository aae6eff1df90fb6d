//! Whether a range is awake, and where its contents are while it is not.

use super::Range;
use crate::engine::books::intervals::Intervals;
use crate::sync::Arc;
use crate::{HostBytes, Result, VmmError};

/// Whether a range is awake.
#[derive(Debug)]
pub(crate) enum Rest {
    /// It has memory behind its live bytes. The copy is what an earlier sleep left.
    Awake(Option<HostCopy>),
    /// A thread puts it to sleep or wakes it, and has the rest. These are the numbers from before.
    Changing(RestStats),
    Asleep(Asleep),
}

/// A range that is asleep. Its books of pages are empty.
#[derive(Debug)]
pub(crate) struct Asleep {
    /// The bytes that were live, and are again when it wakes.
    pub(crate) live: Intervals,
    /// The pages of these bytes, in bytes.
    pub(crate) page_bytes: usize,
    /// Their contents in order, without the gaps; `None` if they were not kept.
    pub(crate) host: Option<Arc<HostBytes>>,
    /// Whether the copy stays when the range wakes.
    pub(crate) is_constant: bool,
}

/// A copy of a range that is awake.
#[derive(Debug)]
pub(crate) struct HostCopy {
    pub(crate) host: Arc<HostBytes>,
    /// The bytes that it is of.
    live: Intervals,
    /// How many calls had changed what is live, when the copy was that of the range.
    changes: u64,
}

/// What a range has asleep, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct RestStats {
    /// Memory that it gave up.
    pub(crate) asleep_bytes: usize,
    /// Memory of host stores that has its contents.
    pub(crate) host_bytes: usize,
}

impl Rest {
    pub(crate) fn is_awake(&self) -> bool {
        matches!(self, Self::Awake(_))
    }

    pub(crate) fn stats(&self) -> RestStats {
        let reserved = |host: &Arc<HostBytes>| host.reserved_bytes();
        match self {
            Self::Awake(copy) => RestStats {
                asleep_bytes: 0,
                host_bytes: copy.as_ref().map_or(0, |copy| reserved(&copy.host)),
            },
            Self::Changing(stats) => *stats,
            Self::Asleep(asleep) => RestStats {
                asleep_bytes: asleep.page_bytes,
                host_bytes: asleep.host.as_ref().map_or(0, reserved),
            },
        }
    }
}

impl Range {
    /// Fails while the range is asleep, or on its way to sleep or back.
    #[inline]
    pub(crate) fn check_awake(&self) -> Result<()> {
        match self.rest.is_awake() {
            true => Ok(()),
            false => Err(self.asleep()),
        }
    }

    #[cold]
    fn asleep(&self) -> VmmError {
        VmmError::Asleep {
            asleep_bytes: self.rest.stats().asleep_bytes,
            is_changing: matches!(self.rest, Rest::Changing(_)),
        }
    }

    /// How many calls have changed what is live, so that a copy of before is not of now.
    fn changes(&self) -> u64 {
        self.counters.allocations + self.counters.deallocations
    }

    /// A copy that is of the range as it is now.
    pub(crate) fn copy_of_now(&self, host: Arc<HostBytes>) -> HostCopy {
        HostCopy {
            host,
            live: self.pages.live().clone(),
            changes: self.changes(),
        }
    }

    /// Whether all that was allocated and freed since the copy was made is nothing.
    pub(crate) fn is_copied(&self, copy: &HostCopy) -> bool {
        copy.changes == self.changes() && copy.live == *self.pages.live()
    }
}
