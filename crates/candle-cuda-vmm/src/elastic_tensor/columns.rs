//! Which rows the columns of a range have.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use std::ops::Range;

/// The rows that each column has, counted from the start of the range.
///
/// A tensor of its own has one column. In a range for several tensors each is a column, and its
/// rows are a part of the range's. Columns grow and shrink one by one, and need not be of one
/// length. Memory follows the [`span`](Self::span), from the first row of any column to the last.
#[derive(Debug, Clone)]
pub(super) struct Columns(Vec<Range<usize>>);

impl Columns {
    /// Columns without rows.
    pub(super) fn new(count: usize) -> Self {
        Self(vec![0..0; count])
    }

    /// Returns the rows of a column: `0..0` if there are none.
    pub(super) fn rows(&self, column: usize) -> Range<usize> {
        self.0[column].clone()
    }

    /// Returns the rows from the first of any column to the last: `0..0` if there are none.
    pub(super) fn span(&self) -> Range<usize> {
        let all = self.0.iter().filter(|rows| !rows.is_empty()).cloned();
        all.reduce(|one, other| one.start.min(other.start)..one.end.max(other.end))
            .unwrap_or(0..0)
    }

    /// Returns the place of a column's next row: behind its last or, if there is none, where the
    /// span begins.
    pub(super) fn next(&self, column: usize) -> usize {
        let rows = &self.0[column];
        match rows.is_empty() {
            true => self.span().start,
            false => rows.end,
        }
    }

    /// Returns all columns.
    pub(super) fn all(&self) -> Range<usize> {
        0..self.0.len()
    }

    /// Returns the length of the span with `more` rows in each of these columns.
    pub(super) fn len_with(&self, columns: impl IntoIterator<Item = usize>, more: usize) -> usize {
        let span = self.span();
        let ends = (columns.into_iter()).map(|column| self.next(column).saturating_add(more));
        ends.fold(span.end, usize::max) - span.start
    }

    /// Adds rows behind the last of a column.
    pub(super) fn add(&mut self, column: usize, count: usize) {
        let (rows, next) = (self.rows(column), self.next(column));
        let start = if rows.is_empty() { next } else { rows.start };
        self.0[column] = start..next + count;
    }

    /// Keeps the first `len` rows of a column. Returns the end of the span if nothing behind it is
    /// needed any more: it has come down, or no column is longer than this one.
    pub(super) fn keep(&mut self, column: usize, len: usize) -> Option<usize> {
        self.shorten(column, |rows| rows.start..rows.start + len)
    }

    /// Drops the first rows of a column. Returns what [`keep`](Self::keep) returns, if no row is
    /// left of it.
    pub(super) fn release_front(&mut self, column: usize, count: usize) -> Option<usize> {
        let end = self.shorten(column, |rows| rows.start + count..rows.end);
        end.filter(|_| self.0[column].is_empty())
    }

    fn shorten(
        &mut self,
        column: usize,
        shorter: impl FnOnce(Range<usize>) -> Range<usize>,
    ) -> Option<usize> {
        let end_before = self.span().end;
        let rows = shorter(self.rows(column));
        self.0[column] = if rows.is_empty() { 0..0 } else { rows };
        let end = self.span().end;
        (end < end_before || end == self.0[column].end).then_some(end)
    }

    /// Notes that the span moved to the start of a range.
    pub(super) fn moved(&mut self) {
        let start = self.span().start;
        for rows in &mut self.0 {
            // Columns without rows are `0..0`.
            *rows = rows.start.saturating_sub(start)..rows.end.saturating_sub(start);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use std::collections::VecDeque;

    #[test]
    fn an_empty_column_begins_where_the_others_do() {
        let mut columns = Columns::new(3);
        assert_eq!((columns.span(), columns.next(1)), (0..0, 0));
        columns.add(0, 5);
        columns.add(1, 7);
        columns.release_front(0, 2);
        assert_eq!(columns.span(), 0..7);
        columns.release_front(1, 3);
        assert_eq!((columns.span(), columns.next(2)), (2..7, 2));
        assert_eq!(columns.len_with([2], 3), 5);
        assert_eq!(columns.len_with([0, 2], 3), 6);
        assert_eq!(columns.len_with([1], usize::MAX), usize::MAX - 2);
        assert_eq!(columns.keep(1, 0), Some(5));
        assert_eq!((columns.span(), columns.rows(1)), (2..5, 0..0));
        assert_eq!(columns.release_front(0, 3), Some(0));
        assert_eq!((columns.span(), columns.next(0)), (0..0, 0));
    }

    #[test]
    fn nothing_behind_the_longest_column_is_needed() {
        let mut columns = Columns::new(3);
        for column in columns.all() {
            columns.add(column, 8);
        }
        // The others still need the rows.
        assert_eq!(columns.keep(0, 5), None);
        assert_eq!(columns.keep(1, 0), None);
        assert_eq!(columns.release_front(0, 5), None);
        assert_eq!(columns.keep(2, 8), Some(8), "nothing is longer");
        columns.add(1, 6);
        assert_eq!(columns.keep(2, 3), Some(6), "another is the longest now");
        assert_eq!(columns.release_front(1, 5), None);
        assert_eq!(columns.release_front(1, 1), Some(3));
        assert_eq!(columns.keep(2, 0), Some(0));
        assert_eq!(columns.keep(1, 0), Some(0), "there was none before");
    }

    /// Each column is a list of tokens, and where each token is in the range is noted beside it.
    #[test]
    fn rows_stay_where_they_are_until_all_of_them_move() {
        let mut random = StdRng::seed_from_u64(16);
        for count in [1, 2, 5] {
            let mut columns = Columns::new(count);
            let mut places = vec![VecDeque::<usize>::new(); count];
            for _ in 0..2000 {
                let column = random.random_range(0..count);
                let len = places[column].len();
                match random.random_range(0..10) {
                    0..5 => {
                        let more = random.random_range(1..6);
                        let next = columns.next(column);
                        columns.add(column, more);
                        places[column].extend(next..next + more);
                    }
                    5 | 6 => {
                        let kept = random.random_range(0..=len);
                        let _ = columns.keep(column, kept);
                        places[column].truncate(kept);
                    }
                    7 | 8 => {
                        let gone = random.random_range(0..=len);
                        let _ = columns.release_front(column, gone);
                        places[column].drain(..gone);
                    }
                    _ => {
                        let start = places.iter().flatten().min().copied().unwrap_or(0);
                        columns.moved();
                        let all = places.iter_mut().flatten();
                        all.for_each(|place| *place -= start);
                    }
                }
                for (column, places) in places.iter().enumerate() {
                    assert!(columns.rows(column).eq(places.iter().copied()));
                }
                let all = || places.iter().flatten();
                let expected =
                    all().min().copied().unwrap_or(0)..all().max().map_or(0, |it| it + 1);
                assert_eq!(columns.span(), expected);
            }
        }
    }
}
