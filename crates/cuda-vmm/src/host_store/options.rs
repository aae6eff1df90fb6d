//! How a host store is made.

use super::UNIT_BYTES;
use crate::{Result, size};

/// How a [`HostStore`](crate::HostStore) is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostStoreOptions {
    /// The size of a piece in bytes, a multiple of 2 MiB. The store registers and gives back whole
    /// pieces. A piece is smaller if the limit leaves no room for a whole one. 256 MiB by default.
    pub piece_bytes: usize,
    /// How many threads touch a new piece, so that the system backs it. The calling thread is one
    /// of them, and is alone with 0 or 1. 8 by default.
    pub threads: usize,
}

impl HostStoreOptions {
    /// The defaults: pieces of 256 MiB, touched by 8 threads.
    pub const fn new() -> Self {
        Self {
            piece_bytes: 256 << 20,
            threads: 8,
        }
    }

    /// With pieces of this size in bytes.
    pub const fn piece_bytes(mut self, bytes: usize) -> Self {
        self.piece_bytes = bytes;
        self
    }

    /// With this many threads that touch a new piece.
    pub const fn threads(mut self, threads: usize) -> Self {
        self.threads = threads;
        self
    }

    pub(super) fn check(self) -> Result<Self> {
        size::multiple("piece size", self.piece_bytes, UNIT_BYTES)?;
        Ok(self)
    }
}

impl Default for HostStoreOptions {
    fn default() -> Self {
        Self::new()
    }
}
