//! How many addresses rows reserve.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

/// How many bytes of addresses rows reserve: enough for the rows that are expected, and more only
/// once there are more rows.
///
/// Rows that run out of addresses move, which copies them. A new range has room for twice what it
/// begins with, so all moves together copy at most two rows for each that is appended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Addresses {
    expected_bytes: usize,
    bytes_max: usize,
    page_bytes: usize,
}

impl Addresses {
    /// For rows that may take `bytes_max` bytes, and are expected to take all of them.
    pub(super) fn new(bytes_max: usize, page_bytes: usize) -> Self {
        Self {
            expected_bytes: bytes_max,
            bytes_max,
            page_bytes,
        }
    }

    /// For rows that may take `bytes_max` bytes, and of which none are expected.
    pub(super) fn unknown(bytes_max: usize, page_bytes: usize) -> Self {
        Self {
            expected_bytes: 0,
            ..Self::new(bytes_max, page_bytes)
        }
    }

    /// Expects at least this many rows. There may be more.
    pub(super) fn expect(&mut self, rows: usize, row_bytes: usize) {
        let bytes = rows.saturating_mul(row_bytes).min(self.bytes_max);
        self.expected_bytes = self.expected_bytes.max(bytes);
    }

    /// Returns the bytes that this many rows take.
    ///
    /// # Errors
    /// `OutOfRange` if they may not take so many.
    pub(super) fn need(&self, rows: usize, row_bytes: usize) -> cuda_vmm::Result<usize> {
        let bytes = rows.checked_mul(row_bytes);
        bytes
            .filter(|bytes| *bytes <= self.bytes_max)
            .ok_or(cuda_vmm::VmmError::OutOfRange {
                offset: 0,
                bytes: rows.saturating_mul(row_bytes),
                capacity_bytes: self.bytes_max,
            })
    }

    /// Returns the size of the first range, for rows that take `need` bytes at once.
    pub(super) fn first(&self, need: usize) -> usize {
        match need <= self.expected_bytes {
            true => self.whole_pages(self.expected_bytes),
            false => self.again(need),
        }
    }

    /// Returns the size of a range that rows of `need` bytes move to.
    pub(super) fn again(&self, need: usize) -> usize {
        self.whole_pages(need.saturating_mul(2).max(self.expected_bytes))
    }

    /// Rounds up to whole pages, as far as that is allowed.
    fn whole_pages(&self, bytes: usize) -> usize {
        let whole = bytes.max(1).checked_next_multiple_of(self.page_bytes);
        whole.map_or(self.bytes_max, |whole| whole.min(self.bytes_max))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 2 << 20;

    fn addresses(expected: usize, most: usize) -> Addresses {
        let mut addresses = Addresses::unknown(most, PAGE);
        addresses.expect(expected, 1);
        addresses
    }

    #[test]
    fn rows_that_are_expected_get_their_pages_and_no_more() {
        let addresses = addresses(3 * PAGE + 1, 100 * PAGE);
        for need in [0, 1, 3 * PAGE, 3 * PAGE + 1] {
            assert_eq!(addresses.first(need), 4 * PAGE);
        }
        assert_eq!(addresses.first(3 * PAGE + 2), 7 * PAGE);
        assert_eq!(addresses.again(PAGE), 4 * PAGE);
        assert_eq!(addresses.again(3 * PAGE), 6 * PAGE);
    }

    #[test]
    fn the_greatest_expectation_counts_and_no_more_than_allowed_is_needed() {
        let mut addresses = addresses(5 * PAGE, 9 * PAGE);
        addresses.expect(2, PAGE);
        assert_eq!(addresses.first(1), 5 * PAGE);
        addresses.expect(usize::MAX, 2);
        assert_eq!(addresses.first(1), 9 * PAGE);
        assert_eq!(addresses.need(3, 3 * PAGE), Ok(9 * PAGE));
        for (rows, row_bytes) in [(10, PAGE), (9, PAGE + 1), (usize::MAX, 2)] {
            let error = cuda_vmm::VmmError::OutOfRange {
                offset: 0,
                bytes: rows.saturating_mul(row_bytes),
                capacity_bytes: 9 * PAGE,
            };
            assert_eq!(addresses.need(rows, row_bytes), Err(error));
        }
    }

    #[test]
    fn nothing_expected_begins_with_a_page_and_everything_is_bounded() {
        assert_eq!(addresses(0, 100 * PAGE).first(0), PAGE);
        assert_eq!(addresses(0, 100 * PAGE).first(1), PAGE);
        assert_eq!(addresses(0, 100 * PAGE).again(70 * PAGE), 100 * PAGE);
        let odd = 12 * PAGE - 100;
        assert_eq!(addresses(usize::MAX, odd).first(1), odd);
        assert_eq!(addresses(odd - 1, odd).first(odd), odd);
        assert_eq!(addresses(usize::MAX, usize::MAX).first(1), usize::MAX);
        assert_eq!(addresses(5, usize::MAX).again(usize::MAX - 1), usize::MAX);
        assert_eq!(addresses(9, PAGE / 2).first(1), PAGE / 2);
    }

    #[test]
    fn moves_copy_at_most_twice_what_is_appended_however_wrong_the_expectation_is() {
        for expected in [0, 1, PAGE, 3 * PAGE + 7, 50 * PAGE] {
            for bytes in [PAGE / 16, PAGE / 3 + 1, PAGE, 5 * PAGE + 3] {
                let addresses = addresses(expected, usize::MAX);
                let (mut len, mut copied, mut capacity) = (0, 0, addresses.first(bytes));
                for _ in 0..2000 {
                    if len + bytes > capacity {
                        copied += len;
                        capacity = addresses.again(len + bytes);
                    }
                    len += bytes;
                    assert!(len <= capacity && copied <= 2 * len, "{expected}, {bytes}");
                }
            }
        }
    }

    #[test]
    fn a_window_at_the_end_of_its_addresses_moves_once_in_its_length() {
        let (window, row) = (100, PAGE / 10);
        let addresses = addresses(window * row, usize::MAX);
        let mut capacity = addresses.first(row);
        let (mut end, mut moves) = (0, 0);
        for _ in 0..10_000 {
            if (end + 1) * row > capacity {
                moves += 1;
                capacity = addresses.again((window + 1) * row);
                end = window;
            }
            end += 1;
        }
        assert!(moves <= 10_000 / window, "{moves}");
    }
}
