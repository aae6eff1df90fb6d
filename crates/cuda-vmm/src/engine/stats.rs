//! Numbers of an engine, taken in one moment.

use crate::MemoryParts;
use crate::size::Readable;
use core::fmt;

/// What an engine holds. The parts add up to [`committed_bytes`](Self::committed_bytes) in every
/// snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
#[non_exhaustive]
pub struct EngineStats {
    /// The budget in bytes.
    pub limit_bytes: usize,
    /// What the device really holds for this engine, in bytes.
    pub committed_bytes: usize,
    /// The same, by what it is.
    pub parts: MemoryParts,
    /// Ranges, including those that are closing.
    pub ranges: usize,
    /// Mappings.
    pub chunks: usize,
    /// Memory that ranges gave up to sleep, and have when they wake, in bytes. Nothing of it is
    /// committed.
    pub asleep_bytes: usize,
    /// Memory of host stores with contents of ranges, in bytes.
    pub host_bytes: usize,
}

impl fmt::Display for EngineStats {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{} committed of {}: {}; {} ranges, {} mappings",
            Readable(self.committed_bytes),
            Readable(self.limit_bytes),
            self.parts,
            self.ranges,
            self.chunks,
        )?;
        write_rest(formatter, self.asleep_bytes, self.host_bytes)
    }
}

/// Writes what is asleep and what host stores have, if there is any.
pub(crate) fn write_rest(
    formatter: &mut fmt::Formatter<'_>,
    asleep_bytes: usize,
    host_bytes: usize,
) -> fmt::Result {
    let (asleep, host) = (Readable(asleep_bytes), Readable(host_bytes));
    match asleep_bytes + host_bytes {
        0 => Ok(()),
        _ => write!(formatter, "; {asleep} asleep, {host} on the host"),
    }
}

/// What one step of an engine did, and what is left to do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
#[non_exhaustive]
pub struct StepReport {
    /// Bytes that the device was seen to have finished with.
    pub retired_bytes: usize,
    /// Bytes given back to the driver or to the cache.
    pub drained_bytes: usize,
    /// Bytes made ahead.
    pub prefetched_bytes: usize,
    /// Bytes that the device may still use.
    pub retiring_bytes: usize,
    /// Bytes that the driver refused to take back.
    pub quarantined_bytes: usize,
}

/// What an account could give back now, in bytes, by how that is done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Givable {
    /// Parked, or made ahead: goes by [`Account::give_back`](crate::Account::give_back), at once.
    pub trimmed_bytes: usize,
    /// In pages of block tables whose blocks are neither pinned, nor leased, nor handed out by an
    /// allocator: goes by a [`ReclaimPlan`](crate::pool::blocks::ReclaimPlan) for all of it. Of
    /// blocks without an allocator the caller alone knows which are in use, so this is the most.
    pub reclaimable_bytes: usize,
    /// Freed, and kept by leases: goes when those end.
    pub leased_bytes: usize,
}

/// What an account holds, on all its ranges.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
#[non_exhaustive]
pub struct AccountStats {
    /// Its ranges of addresses that are open.
    pub ranges: usize,
    /// Their addresses in bytes.
    pub capacity_bytes: usize,
    /// Bytes that were asked for and not given back.
    pub live_bytes: usize,
    /// What the device really holds for the account, in bytes.
    pub committed_bytes: usize,
    /// The same, by what it is; nothing of it is cached.
    pub parts: MemoryParts,
    /// Mappings.
    pub chunks: usize,
    /// Memory that its ranges gave up to sleep, and have when they wake, in bytes. Nothing of it is
    /// committed.
    pub asleep_bytes: usize,
    /// Memory of host stores with contents of its ranges, in bytes.
    pub host_bytes: usize,
}

impl fmt::Display for AccountStats {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{} live over {} of addresses in {} ranges; {} committed: {}",
            Readable(self.live_bytes),
            Readable(self.capacity_bytes),
            self.ranges,
            Readable(self.committed_bytes),
            self.parts,
        )?;
        write_rest(formatter, self.asleep_bytes, self.host_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_account_holds_reads_well() {
        let stats = AccountStats {
            ranges: 3,
            capacity_bytes: 4 << 20,
            live_bytes: 1 << 10,
            committed_bytes: 2 << 20,
            chunks: 1,
            ..AccountStats::default()
        };
        let text = stats.to_string();
        let expected = "1 KiB live over 4 MiB of addresses in 3 ranges; 2 MiB committed: ";
        assert_eq!(text, format!("{expected}{}", MemoryParts::default()));
    }
}
