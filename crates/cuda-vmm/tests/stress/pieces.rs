//! What one thread believes of its range: which bytes are live, and what each of them is.

use rand::Rng;
use rand::rngs::SmallRng;
use std::collections::BTreeMap;
use std::ops::Range;

/// Bytes that are live and all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    pub offset: usize,
    pub bytes: usize,
    pub value: u8,
}

impl Piece {
    pub fn end(&self) -> usize {
        self.offset + self.bytes
    }
}

/// The pieces of a range of addresses, which do not overlap.
#[derive(Debug, Default)]
pub struct Pieces(BTreeMap<usize, Piece>);

impl Pieces {
    pub fn all(&self) -> impl Iterator<Item = Piece> + '_ {
        self.0.values().copied()
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// One of them.
    pub fn any(&self, random: &mut SmallRng) -> Option<Piece> {
        let count = self.0.len();
        (count > 0).then(|| self.0.values().nth(random.random_range(0..count)).copied())?
    }

    /// The whole run of live bytes around an offset that is live.
    pub fn run(&self, offset: usize) -> Range<usize> {
        let (mut start, mut end) = (offset, offset);
        for (_, piece) in self.0.range(..=offset).rev() {
            if piece.end() < start {
                break;
            }
            start = piece.offset;
            end = end.max(piece.end());
        }
        for (_, piece) in self.0.range(end..) {
            if piece.offset > end {
                break;
            }
            end = piece.end();
        }
        start..end
    }

    /// The pieces in a range that begins and ends with pieces, or within one.
    pub fn within(&self, bytes: &Range<usize>) -> Vec<Piece> {
        let before = self.0.range(..bytes.start).next_back();
        let pieces = before.into_iter().chain(self.0.range(bytes.clone()));
        let parts = pieces
            .filter(|(_, piece)| piece.end() > bytes.start)
            .map(|(_, piece)| {
                let offset = piece.offset.max(bytes.start);
                Piece {
                    offset,
                    bytes: piece.end().min(bytes.end) - offset,
                    ..*piece
                }
            });
        parts.collect()
    }

    /// Where `bytes` bytes are free, if there is a place.
    pub fn free(&self, bytes: usize, capacity: usize, random: &mut SmallRng) -> Option<usize> {
        let mut places = Vec::new();
        let mut from = 0;
        for to in self.0.values().copied().chain([Piece {
            offset: capacity,
            bytes: 0,
            value: 0,
        }]) {
            if from + bytes <= to.offset {
                places.push((from, to.offset));
            }
            from = to.end();
        }
        if places.is_empty() {
            return None;
        }
        let (from, to) = places[random.random_range(0..places.len())];
        // At an end as often as not, so that pieces share pages and runs grow.
        Some(match random.random_range(0..4) {
            0 => from,
            1 => to - bytes,
            _ => random.random_range(from..=to - bytes),
        })
    }

    /// Bytes are live now, or are something else now.
    pub fn set(&mut self, piece: Piece) {
        self.cut(piece.offset..piece.end());
        self.0.insert(piece.offset, piece);
    }

    /// Bytes are no longer live.
    pub fn cut(&mut self, bytes: Range<usize>) {
        let touched: Vec<_> = (self.0.range(..bytes.end))
            .rev()
            .take_while(|(_, piece)| piece.end() > bytes.start)
            .map(|(_, piece)| *piece)
            .collect();
        for piece in touched {
            self.0.remove(&piece.offset);
            if piece.offset < bytes.start {
                let bytes = bytes.start - piece.offset;
                self.0.insert(piece.offset, Piece { bytes, ..piece });
            }
            if piece.end() > bytes.end {
                let rest = Piece {
                    offset: bytes.end,
                    bytes: piece.end() - bytes.end,
                    ..piece
                };
                self.0.insert(rest.offset, rest);
            }
        }
    }
}

#[test]
fn pieces_are_cut_where_others_begin_and_end() {
    let mut pieces = Pieces::default();
    let piece = |offset, bytes, value| Piece {
        offset,
        bytes,
        value,
    };
    pieces.set(piece(0, 100, 1));
    pieces.set(piece(40, 20, 2));
    pieces.set(piece(90, 20, 3));
    pieces.cut(50..55);
    let expected = [
        piece(0, 40, 1),
        piece(40, 10, 2),
        piece(55, 5, 2),
        piece(60, 30, 1),
        piece(90, 20, 3),
    ];
    assert!(pieces.all().eq(expected), "{pieces:?}");
    assert_eq!(pieces.run(45), 0..50);
    assert_eq!(pieces.run(100), 55..110);
    assert_eq!(
        pieces.within(&(58..70)),
        [piece(58, 2, 2), piece(60, 10, 1)]
    );
}
