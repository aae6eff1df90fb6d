//! The numbers of a host store.

use crate::size::Readable;
use core::fmt;

/// What a [`HostStore`](crate::HostStore) holds at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct HostStoreStats {
    /// The most that may be registered, in bytes.
    pub limit_bytes: usize,
    /// Host memory that is registered with the driver, in bytes. It is more than the limit only
    /// after the limit was lowered below what was in use.
    pub registered_bytes: usize,
    /// Bytes that are reserved, and bytes that a call is about to reserve, in multiples of 2 MiB.
    pub in_use_bytes: usize,
    /// The number of pieces that are registered.
    pub pieces: usize,
}

impl HostStoreStats {
    /// Registered bytes that no reservation uses.
    pub fn free_bytes(&self) -> usize {
        self.registered_bytes.saturating_sub(self.in_use_bytes)
    }

    /// Bytes that can be reserved now.
    pub fn available_bytes(&self) -> usize {
        self.limit_bytes.saturating_sub(self.in_use_bytes)
    }
}

impl fmt::Display for HostStoreStats {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "host store: {} in use of {} registered in {} pieces, limit {}",
            Readable(self.in_use_bytes),
            Readable(self.registered_bytes),
            self.pieces,
            Readable(self.limit_bytes)
        )
    }
}
