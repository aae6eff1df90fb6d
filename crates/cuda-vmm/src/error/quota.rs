//! Which guarantees, ceilings and limits cannot hold together.

use core::fmt;

/// The two values of a [`QuotaUnsatisfiable`](crate::VmmError::QuotaUnsatisfiable) that exclude
/// each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum QuotaConflict {
    /// A guarantee, and the memory that others hold or are guaranteed. It can be given once they
    /// need less.
    Guarantee,
    /// A guarantee, and the ceiling of the same quota.
    GuaranteeAboveCeiling,
    /// A guarantee, and the engine's limit.
    GuaranteeAboveLimit,
    /// What all accounts are guaranteed, and a limit that is to be lowered below that.
    LimitBelowGuarantees,
    /// [`headroom_bytes`](crate::EngineOptions::headroom_bytes), and the device's memory.
    Headroom,
    /// [`park_bytes_min`](crate::EngineOptions::park_bytes_min), and `park_bytes_max`.
    ParkBytesMin,
    /// [`ahead_bytes_min`](crate::PoolOptions::ahead_bytes_min), and `ahead_bytes_max`.
    AheadBytesMin,
}

impl fmt::Display for QuotaConflict {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Guarantee => "guarantee",
            Self::GuaranteeAboveCeiling => "guarantee above its ceiling",
            Self::GuaranteeAboveLimit => "guarantee above the limit",
            Self::LimitBelowGuarantees => "guarantees above a new limit",
            Self::Headroom => "headroom",
            Self::ParkBytesMin => "park_bytes_min above park_bytes_max",
            Self::AheadBytesMin => "ahead_bytes_min above ahead_bytes_max",
        })
    }
}
