//! Where a rotating cache keeps which token.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use std::ops::Range;

/// A ring of the last `window` tokens, counted in rows.
///
/// While there are fewer than `window` tokens, they are in order from row 0 on, and the next goes
/// behind them. In a full ring the next token overwrites the oldest, in row `offset`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ring {
    window: usize,
    /// Rows in use.
    len: usize,
    /// The row of the next token.
    offset: usize,
    /// The position of the next token in the sequence.
    position: usize,
}

/// Tokens of an append, counted from its first, and the row where they begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) row: usize,
    pub(super) tokens: Range<usize>,
}

impl Run {
    fn new(row: usize, first: usize, count: usize) -> Self {
        let tokens = first..first + count;
        Self { row, tokens }
    }
}

/// Where the tokens of an append go. A run may be empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Runs {
    /// New rows behind the existing ones.
    pub(super) behind: Run,
    /// Existing rows.
    pub(super) over: [Run; 2],
}

impl Ring {
    /// An empty ring. `window` is not 0.
    pub(super) fn new(window: usize) -> Self {
        Self {
            window,
            len: 0,
            offset: 0,
            position: 0,
        }
    }

    pub(super) fn window(&self) -> usize {
        self.window
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn offset(&self) -> usize {
        self.offset
    }

    pub(super) fn position(&self) -> usize {
        self.position
    }

    /// Returns whether the rows are in the order of their tokens.
    pub(super) fn is_in_order(&self) -> bool {
        self.len < self.window || self.offset == 0
    }

    /// Where the next `count` tokens go. Only the last `window` of them are kept.
    pub(super) fn runs(&self, count: usize) -> Runs {
        let kept = count.min(self.window);
        let skipped = count - kept;
        // Candle's cache begins anew with as many tokens as fill it.
        let start = match kept == self.window {
            true => 0,
            false => self.offset,
        };
        let first_end = (start + kept).min(self.window);
        let over_end = first_end.min(self.len).max(start);
        let wrapped = skipped + first_end - start;
        Runs {
            behind: Run::new(over_end, skipped + over_end - start, first_end - over_end),
            over: [
                Run::new(start, skipped, over_end - start),
                Run::new(0, wrapped, count - wrapped),
            ],
        }
    }

    /// Notes that `count` tokens were appended.
    pub(super) fn append(&mut self, count: usize) {
        self.len = (self.len + count).min(self.window);
        self.offset = match count < self.window {
            true => (self.offset + count) % self.window,
            false => 0,
        };
        self.position += count;
    }

    /// Notes that `len` tokens are left, in order from row 0 on.
    pub(super) fn set_in_order(&mut self, len: usize, position: usize) {
        self.len = len;
        self.offset = len % self.window;
        self.position = position;
    }

    /// Returns the positions of the tokens that an append of `count` tokens returns.
    ///
    /// For exactly `window` tokens it returns what Candle's cache returns: the order of rows that
    /// go on from the offset.
    pub(super) fn positions(&self, count: usize) -> Vec<usize> {
        let next = self.position + count;
        if count > self.window {
            return (self.position..next).collect();
        }
        let offset = (self.offset + count) % self.window;
        let len = (self.len + count).min(self.window);
        // The rows from the offset on have the oldest tokens.
        let older = |row| if row < offset { 0 } else { self.window };
        (0..len)
            .map(|row| next + row - offset - older(row))
            .collect()
    }

    /// Returns which of the tokens that an append returns each of its `count` tokens must not see,
    /// as ones: `[count, tokens]`. Also returns the number of tokens.
    pub(super) fn mask(&self, count: usize) -> (Vec<u8>, usize) {
        let positions = match count < self.window {
            true => self.positions(count),
            false => (self.position..self.position + count).collect(),
        };
        let hidden = |query: usize, key: usize| key > query || key + self.window < query;
        let rows = self.position..self.position + count;
        let mask = rows.flat_map(|query| {
            let keys = positions.iter();
            keys.map(move |&key| u8::from(hidden(query, key)))
        });
        (mask.collect(), positions.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    /// Rows with the positions of their tokens.
    fn write(rows: &mut Vec<usize>, ring: &Ring, count: usize) {
        let Runs { behind, over } = ring.runs(count);
        let position = |token| ring.position() + token;
        assert!(behind.tokens.is_empty() || behind.row == rows.len());
        rows.extend(behind.tokens.clone().map(position));
        for Run { row, tokens } in over {
            for (at, token) in tokens.enumerate() {
                rows[row + at] = position(token);
            }
        }
    }

    #[test]
    fn a_ring_has_the_last_tokens() {
        let mut random = StdRng::seed_from_u64(3);
        for window in [1, 2, 3, 7] {
            let (mut ring, mut rows) = (Ring::new(window), Vec::new());
            for _ in 0..500 {
                if ring.is_in_order() && random.random_range(0..8) == 0 {
                    let len = random.random_range(0..=ring.len());
                    rows.truncate(len);
                    ring.set_in_order(len, ring.position() - (ring.len() - len));
                }
                let count = random.random_range(0..2 * window + 2);
                let before = rows.len();
                write(&mut rows, &ring, count);
                let expected = ring.positions(count);
                ring.append(count);
                assert_eq!(
                    (rows.len(), ring.len()),
                    (window.min(before + count), rows.len())
                );
                let mut in_order = rows.clone();
                in_order.sort_unstable();
                let first = ring.position() - ring.len();
                assert_eq!(in_order, (first..ring.position()).collect::<Vec<_>>());
                assert_eq!(rows.is_sorted(), ring.is_in_order());
                if count < window {
                    assert_eq!(rows, expected);
                }
                if ring.len() == window {
                    assert_eq!(rows[ring.offset()], first, "the oldest is next");
                }
            }
        }
    }
}
