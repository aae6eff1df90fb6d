//! Memory by what it is.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use crate::size::Readable;
use core::fmt;
use core::iter::Sum;
use core::ops::{Add, AddAssign, Sub};

/// Memory by what it is, in bytes of whole pages. Every committed byte is in exactly one part.
///
/// Parts add up and subtract one by one: the parts of an engine are the sum of those of its ranges,
/// and of what is on no range's account, which is what is cached and what is shared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
#[non_exhaustive]
pub struct MemoryParts {
    /// Pages with live bytes.
    pub live_page_bytes: usize,
    /// Pages whose bytes were all freed, and some of which are leased; see
    /// [`VirtualMemoryPool::lease`](crate::VirtualMemoryPool::lease).
    pub leased_bytes: usize,
    /// In chunks that several ranges of an account map, counted once; on no range's account. See
    /// [`Account::share_many`](crate::Account::share_many).
    pub shared_bytes: usize,
    /// Pages without live bytes in chunks that have others.
    pub slack_bytes: usize,
    /// Being made.
    pub filling_bytes: usize,
    /// Freed, but the device may still use it, or it is being unmapped.
    pub retiring_bytes: usize,
    /// Freed and still mapped, to be taken back without a driver call.
    pub parked_bytes: usize,
    /// Made before any allocation needs it, and given up first.
    pub ahead_bytes: usize,
    /// Clean and mapped nowhere, to be mapped again; on no range's account.
    pub cached_bytes: usize,
    /// Refused by the driver when it was to be given back, or mapped again by
    /// [`compact`](crate::VirtualMemoryPool::compact); retried.
    pub quarantined_bytes: usize,
}

/// The least that a part can belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    Range,
    Account,
    Engine,
}

/// One part, for code that lists them.
pub(crate) struct Part {
    pub(crate) name: &'static str,
    pub(crate) meaning: &'static str,
    pub(crate) level: Level,
    pub(crate) bytes: fn(&MemoryParts) -> usize,
}

impl MemoryParts {
    /// The parts, in the order in which they are printed.
    pub(crate) const LIST: [Part; 10] = [
        Part {
            name: "live",
            meaning: "Pages with live bytes.",
            level: Level::Range,
            bytes: |parts| parts.live_page_bytes,
        },
        Part {
            name: "leased",
            meaning: "Pages whose bytes were all freed, and some of which are leased.",
            level: Level::Range,
            bytes: |parts| parts.leased_bytes,
        },
        Part {
            name: "shared",
            meaning: "In chunks that several ranges map, counted once.",
            level: Level::Account,
            bytes: |parts| parts.shared_bytes,
        },
        Part {
            name: "slack",
            meaning: "Pages without live bytes in chunks that have others.",
            level: Level::Range,
            bytes: |parts| parts.slack_bytes,
        },
        Part {
            name: "filling",
            meaning: "Being made.",
            level: Level::Range,
            bytes: |parts| parts.filling_bytes,
        },
        Part {
            name: "retiring",
            meaning: "Freed, but the device may still use it, or it is being unmapped.",
            level: Level::Range,
            bytes: |parts| parts.retiring_bytes,
        },
        Part {
            name: "parked",
            meaning: "Freed and still mapped, to be taken back without a driver call.",
            level: Level::Range,
            bytes: |parts| parts.parked_bytes,
        },
        Part {
            name: "ahead",
            meaning: "Made before any allocation needs it.",
            level: Level::Range,
            bytes: |parts| parts.ahead_bytes,
        },
        Part {
            name: "cached",
            meaning: "Clean and mapped nowhere.",
            level: Level::Engine,
            bytes: |parts| parts.cached_bytes,
        },
        Part {
            name: "quarantined",
            meaning: "Refused by the driver when it was to be given back; retried.",
            level: Level::Range,
            bytes: |parts| parts.quarantined_bytes,
        },
    ];

    /// All of it, in bytes: what is committed.
    pub fn total_bytes(&self) -> usize {
        Self::LIST.iter().map(|part| (part.bytes)(self)).sum()
    }

    /// What is held and serves no allocation, in bytes: parked, ahead and cached memory, which the
    /// engine gives up before it refuses an allocation, and slack, which
    /// [`compact`](crate::VirtualMemoryPool::compact) gives back.
    ///
    /// This is an upper bound: pinned pages, and chunks with live bytes that cannot be moved now,
    /// stay.
    pub fn reclaimable_bytes(&self) -> usize {
        self.parked_bytes + self.ahead_bytes + self.cached_bytes + self.slack_bytes
    }

    /// Writes some of the parts.
    pub(crate) fn write<'a>(
        &self,
        formatter: &mut fmt::Formatter<'_>,
        parts: impl Iterator<Item = &'a Part>,
    ) -> fmt::Result {
        for (index, part) in parts.enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            let bytes = Readable((part.bytes)(self));
            write!(formatter, "{comma}{bytes} {}", part.name)?;
        }
        Ok(())
    }

    fn each(self, other: Self, join: impl Fn(usize, usize) -> usize) -> Self {
        Self {
            live_page_bytes: join(self.live_page_bytes, other.live_page_bytes),
            leased_bytes: join(self.leased_bytes, other.leased_bytes),
            shared_bytes: join(self.shared_bytes, other.shared_bytes),
            slack_bytes: join(self.slack_bytes, other.slack_bytes),
            filling_bytes: join(self.filling_bytes, other.filling_bytes),
            retiring_bytes: join(self.retiring_bytes, other.retiring_bytes),
            parked_bytes: join(self.parked_bytes, other.parked_bytes),
            ahead_bytes: join(self.ahead_bytes, other.ahead_bytes),
            cached_bytes: join(self.cached_bytes, other.cached_bytes),
            quarantined_bytes: join(self.quarantined_bytes, other.quarantined_bytes),
        }
    }
}

impl Add for MemoryParts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        self.each(other, |own, other| own + other)
    }
}

impl AddAssign for MemoryParts {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sum for MemoryParts {
    fn sum<I: Iterator<Item = Self>>(parts: I) -> Self {
        parts.fold(Self::default(), Add::add)
    }
}

/// No part becomes less than nothing.
impl Sub for MemoryParts {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        self.each(other, usize::saturating_sub)
    }
}

/// As `2 MiB live, 0 B leased, …`.
impl fmt::Display for MemoryParts {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(formatter, Self::LIST.iter())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parts of which no two sums are the same: powers of two from `first` on.
    fn parts(first: usize) -> MemoryParts {
        MemoryParts {
            live_page_bytes: first,
            leased_bytes: 2 * first,
            shared_bytes: 4 * first,
            slack_bytes: 8 * first,
            filling_bytes: 16 * first,
            retiring_bytes: 32 * first,
            parked_bytes: 64 * first,
            ahead_bytes: 128 * first,
            cached_bytes: 256 * first,
            quarantined_bytes: 512 * first,
        }
    }

    #[test]
    fn the_total_is_all_parts_and_what_can_be_given_up_is_four_of_them() {
        assert_eq!(parts(1).total_bytes(), 1023);
        assert_eq!(parts(1).reclaimable_bytes(), 8 + 64 + 128 + 256);
    }

    #[test]
    fn parts_add_up_one_by_one_and_none_becomes_less_than_nothing() {
        assert_eq!(parts(1) + parts(2), parts(3));
        assert_eq!(
            [parts(1), parts(2)].into_iter().sum::<MemoryParts>(),
            parts(3)
        );
        let mut sum = parts(5);
        sum += parts(2);
        assert_eq!(sum, parts(7));
        assert_eq!(parts(7) - parts(2), parts(5));
        assert_eq!(parts(2) - parts(7), MemoryParts::default());
    }

    #[test]
    fn all_parts_are_written_in_their_order() {
        let text = "1 B live, 2 B leased, 4 B shared, 8 B slack, 16 B filling, 32 B retiring, \
                    64 B parked, 128 B ahead, 256 B cached, 512 B quarantined";
        assert_eq!(parts(1).to_string(), text);
    }
}
