//! Whose memory a call is about.

use super::books::account::AccountId;
use super::books::range_id::RangeId;

/// The ranges that a call looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// All of the engine.
    All,
    /// Those that are charged to one account.
    Account(AccountId),
    /// One range.
    Range(RangeId),
}
