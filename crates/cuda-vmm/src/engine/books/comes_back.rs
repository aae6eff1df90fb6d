//! Memory that an account does not have to give back itself.

/// What of an account's memory comes back without its owner's doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ComesBack {
    /// What retires, and what is given up if another account needs it, in bytes.
    pub(crate) coming_bytes: usize,
    /// What is given up if it is needed, in bytes.
    pub(crate) spare_bytes: usize,
}
