//! Rounding to pages.

/// Rounds a capacity up to whole pages. If that overflows, returns it unchanged; the core refuses
/// it.
pub(super) fn whole_pages(capacity: usize, page: usize) -> usize {
    capacity.checked_next_multiple_of(page).unwrap_or(capacity)
}
