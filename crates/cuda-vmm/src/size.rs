//! Checked sizes: extents of bytes that are known to lie inside a capacity.

use crate::{Result, VmmError};
use core::ops::Range;

/// A non-empty run of bytes inside a range, checked when made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) offset: usize,
    pub(crate) bytes: usize,
}

impl Extent {
    /// Checks `bytes` bytes at `offset` against a capacity in bytes.
    pub(crate) fn new(offset: usize, bytes: usize, capacity_bytes: usize) -> Result<Self> {
        if bytes == 0 {
            return Err(VmmError::ZeroSize { what: "size" });
        }
        let end = offset
            .checked_add(bytes)
            .ok_or(VmmError::Overflow { offset, bytes })?;
        if end > capacity_bytes {
            return Err(VmmError::OutOfRange {
                offset,
                bytes,
                capacity_bytes,
            });
        }
        Ok(Self { offset, bytes })
    }

    pub(crate) fn range(self) -> Range<usize> {
        self.offset..self.offset + self.bytes
    }

    /// The pages that the bytes touch.
    pub(crate) fn pages(self, page_bytes: usize) -> Range<usize> {
        self.offset / page_bytes..(self.offset + self.bytes).div_ceil(page_bytes)
    }
}

/// Adds a run behind others. It is joined with the last if it begins where that ends.
pub(crate) fn push_run(runs: &mut Vec<Range<usize>>, run: Range<usize>) {
    match runs.last_mut() {
        Some(last) if last.end == run.start => last.end = run.end,
        _ => runs.push(run),
    }
}

/// Checks that `value` is a non-zero multiple of `required`.
pub(crate) fn multiple(what: &'static str, value: usize, required: usize) -> Result<usize> {
    if value == 0 {
        return Err(VmmError::ZeroSize { what });
    }
    if !value.is_multiple_of(required) {
        return Err(VmmError::Misaligned {
            what,
            value,
            required,
        });
    }
    Ok(value)
}

/// Checks the size of a page: a power of two of at least the device's granularity.
///
/// # Errors
/// [`VmmError::InvalidPageSize`].
pub fn check_page_bytes(page_bytes: usize, granularity_bytes: usize) -> Result<()> {
    if page_bytes.is_power_of_two() && page_bytes.is_multiple_of(granularity_bytes) {
        return Ok(());
    }
    Err(VmmError::InvalidPageSize {
        page_bytes,
        granularity_bytes,
    })
}

/// Bytes for people: `1.50 GiB`, `2 MiB`, `17 B`.
pub(crate) struct Readable(pub(crate) usize);

impl core::fmt::Display for Readable {
    fn fmt(&self, formatter: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let (mut value, mut unit) = (self.0 as f64, "B");
        for larger in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
            if value < 1024.0 {
                break;
            }
            (value, unit) = (value / 1024.0, larger);
        }
        if value.fract() == 0.0 {
            write!(formatter, "{value} {unit}")
        } else {
            write!(formatter, "{value:.2} {unit}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extent_is_checked_against_zero_overflow_and_capacity() {
        assert_eq!(
            Extent::new(0, 0, 8),
            Err(VmmError::ZeroSize { what: "size" })
        );
        assert_eq!(
            Extent::new(usize::MAX, 2, 8),
            Err(VmmError::Overflow {
                offset: usize::MAX,
                bytes: 2
            })
        );
        assert_eq!(
            Extent::new(7, 2, 8),
            Err(VmmError::OutOfRange {
                offset: 7,
                bytes: 2,
                capacity_bytes: 8
            })
        );
        assert_eq!(Extent::new(6, 2, 8).map(|extent| extent.pages(4)), Ok(1..2));
        assert_eq!(Extent::new(3, 2, 8).map(|extent| extent.pages(4)), Ok(0..2));
        assert_eq!(Extent::new(3, 2, 8).map(Extent::range), Ok(3..5));
    }

    #[test]
    fn a_size_is_a_multiple_that_is_not_zero() {
        assert_eq!(multiple("size", 12, 4), Ok(12));
        assert_eq!(
            multiple("size", 0, 4),
            Err(VmmError::ZeroSize { what: "size" })
        );
        let expected = VmmError::Misaligned {
            what: "size",
            value: 13,
            required: 4,
        };
        assert_eq!(multiple("size", 13, 4), Err(expected));
    }

    #[test]
    fn a_page_is_a_power_of_two_of_at_least_the_granularity() {
        assert_eq!(check_page_bytes(8, 8), Ok(()));
        assert_eq!(check_page_bytes(16, 8), Ok(()));
        for page_bytes in [0, 4, 24] {
            let expected = VmmError::InvalidPageSize {
                page_bytes,
                granularity_bytes: 8,
            };
            assert_eq!(check_page_bytes(page_bytes, 8), Err(expected));
        }
    }

    #[test]
    fn runs_that_touch_are_one() {
        let mut runs = Vec::new();
        for run in [2..4, 4..5, 6..7, 0..1, 1..2] {
            push_run(&mut runs, run);
        }
        assert_eq!(runs, [2..5, 6..7, 0..2]);
    }

    #[test]
    fn bytes_read_well() {
        let text = |bytes| Readable(bytes).to_string();
        assert_eq!(text(17), "17 B");
        assert_eq!(text(1023), "1023 B");
        assert_eq!(text(1024), "1 KiB");
        assert_eq!(text(2 << 20), "2 MiB");
        assert_eq!(text((3 << 30) / 2), "1.50 GiB");
    }
}
