//! Whose memory it is.

use super::account::AccountId;
use super::range_id::RangeId;

/// The account that is charged for memory, and the range that the memory is or was of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Owner {
    pub(crate) account: AccountId,
    pub(crate) range: RangeId,
}
