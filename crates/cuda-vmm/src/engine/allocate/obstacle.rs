//! What can be in the way of an allocation.

use crate::VmmError;
use crate::engine::books::account::AccountId;
use crate::engine::books::ledger::Refusal;
use crate::size::Extent;

/// What is in the way of an allocation.
pub(super) enum Obstacle {
    /// The call is wrong, or the range is closed.
    Final(VmmError),
    /// More than the account may ever hold.
    TooLarge { whole_bytes: usize, room: Refusal },
    /// Some of the bytes were freed, and are leased still.
    Leased(Extent),
    /// The driver has refused to take back some of the pages, of this many bytes each.
    Quarantined(Extent, usize),
    /// Another thread makes, moves or unmaps some of the pages.
    Busy(Extent),
    /// More was freed of the range than is put into the queue at once.
    Backlog,
    /// Some of the pages are in shared chunks that are to be unmapped, or that the device may still
    /// use.
    Leaving(Extent),
    /// The device may still use some of the pages, in the chunks that begin at these.
    Retiring(Extent, Vec<usize>),
    /// The budget has no room.
    Short(Lack),
}

/// Memory that the budget has no room for.
pub(super) struct Lack {
    pub(super) account: AccountId,
    pub(super) bytes: usize,
    /// What there is instead.
    pub(super) refusal: Refusal,
    /// Whether more is held than a ceiling or limit allows that was lowered.
    pub(super) is_over: bool,
}

impl From<VmmError> for Obstacle {
    fn from(error: VmmError) -> Self {
        Self::Final(error)
    }
}

impl Obstacle {
    pub(super) fn already_mapped(Extent { offset, bytes }: Extent) -> Self {
        Self::Final(VmmError::AlreadyMapped { offset, bytes })
    }

    pub(super) fn shared(Extent { offset, bytes }: Extent) -> Self {
        Self::Final(VmmError::Shared { offset, bytes })
    }
}
