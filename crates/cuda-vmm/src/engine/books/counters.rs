//! What has happened, counted. Numbers only rise.

use core::time::Duration;

/// What has happened on one range since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
#[non_exhaustive]
pub struct PoolCounters {
    /// Calls that made bytes live.
    pub allocations: u64,
    /// Calls that ended the life of bytes.
    pub deallocations: u64,
    /// Calls that made none live because memory could not be had
    /// ([`is_out_of_memory`](crate::VmmError::is_out_of_memory)).
    pub refusals: u64,
    /// Allocations on a range with memory made ahead of need that called the driver all the same.
    pub late_prefetches: u64,
}

impl PoolCounters {
    /// Adds what has happened on another range.
    pub(crate) fn add(&mut self, other: &Self) {
        self.allocations += other.allocations;
        self.deallocations += other.deallocations;
        self.refusals += other.refusals;
        self.late_prefetches += other.late_prefetches;
    }
}

/// What has happened on an engine since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
#[non_exhaustive]
pub struct EngineCounters {
    /// On all its ranges, those included that are gone.
    pub ranges: PoolCounters,
    /// How often a thread has waited for the device, or for what another thread does with the same
    /// memory.
    pub waits: u64,
    /// How often the device had no memory although the budget had room.
    pub device_shortages: u64,
    /// Pieces of memory that the driver was asked again to take back.
    pub retries: u64,
    /// Bytes overwritten with zeros before others may have them.
    pub scrubbed_bytes: u64,
    /// Ranges that were put to sleep.
    pub sleeps: u64,
    /// How long the calls took that did so, in microseconds.
    pub sleep_micros: u64,
    /// Ranges that were woken.
    pub wakes: u64,
    /// How long the calls took that did so, in microseconds. What still comes when a wake
    /// [streams](crate::VirtualMemoryPool::wake_streaming) does not count.
    pub wake_micros: u64,
    /// Calls that reserve, make, map, open, unmap, release or free memory or addresses of the
    /// device, refused ones and those outside engines included: all calls of this process that go
    /// through the same [`Device`](crate::Device).
    pub device_calls: u64,
}

impl EngineCounters {
    /// Counts ranges that one call has put to sleep.
    pub(crate) fn count_sleep(&mut self, ranges: usize, took: Duration) {
        self.sleeps += ranges as u64;
        self.sleep_micros += micros(took);
    }

    /// Counts ranges that one call has woken.
    pub(crate) fn count_wake(&mut self, ranges: usize, took: Duration) {
        self.wakes += ranges as u64;
        self.wake_micros += micros(took);
    }
}

fn micros(took: Duration) -> u64 {
    u64::try_from(took.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happened_on_two_ranges_adds_up() {
        let counted = |first| PoolCounters {
            allocations: first,
            deallocations: 2 * first,
            refusals: 4 * first,
            late_prefetches: 8 * first,
        };
        let mut counters = counted(3);
        counters.add(&counted(4));
        assert_eq!(counters, counted(7));
    }
}
