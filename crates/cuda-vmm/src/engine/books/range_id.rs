//! The name of a range.

/// Names a range of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct RangeId(pub(crate) u64);
