//! What an allocation asks for.

use crate::engine::books::account::AccountId;
use crate::engine::books::owner::Owner;
use crate::engine::books::range_id::RangeId;
use crate::engine::handle::RangeHandle;
use crate::engine::range::Place;

/// Bytes that are wanted of one range.
///
/// The asks of one allocation are all served or none. They are of one account, and each is of
/// another range. An ask has one place, or offsets that rise without overlapping.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ask<'a> {
    pub(crate) handle: &'a RangeHandle,
    /// Where, and how many bytes.
    pub(crate) places: &'a [(Place, usize)],
    /// Whether the range is asleep and the bytes are those that were live. Otherwise it must be
    /// awake.
    pub(crate) wakes: bool,
}

impl Ask<'_> {
    pub(super) fn range(&self) -> RangeId {
        self.handle.id()
    }

    pub(super) fn account(&self) -> AccountId {
        self.handle.account().id()
    }

    pub(super) fn owner(&self) -> Owner {
        self.handle.owner()
    }
}
