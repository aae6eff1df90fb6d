//! Which bytes of which piece are free. Pure bookkeeping: no memory, no driver, no lock.
//!
//! A reservation is a *promise* of bytes first, which is checked against the limit. The promise is
//! then kept with free extents, from existing pieces or from new ones. So two reservations that are
//! made at once never exceed the limit together. All sizes are multiples of [`UNIT_BYTES`].
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::UNIT_BYTES;
use super::stats::HostStoreStats;
use crate::{Result, VmmError};
use std::collections::BTreeMap;

/// The number of a piece. A number is never used again.
pub(super) type PieceNumber = usize;

/// Bytes of one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PieceExtent {
    pub(super) piece: PieceNumber,
    pub(super) offset: usize,
    pub(super) bytes: usize,
}

#[derive(Debug)]
struct PieceBooks {
    bytes: usize,
    /// Ends of the free extents by their starts. No two of them touch.
    free: BTreeMap<usize, usize>,
}

impl PieceBooks {
    fn new(bytes: usize) -> Self {
        Self {
            bytes,
            free: BTreeMap::from([(0, bytes)]),
        }
    }

    fn is_empty(&self) -> bool {
        self.free.get(&0) == Some(&self.bytes)
    }

    /// Takes the first bytes of the free extent that begins at `start`, at most all of it.
    fn take(&mut self, start: usize, bytes: usize) -> usize {
        let Some(end) = self.free.remove(&start) else {
            return 0;
        };
        let taken = bytes.min(end - start);
        if start + taken < end {
            self.free.insert(start + taken, end);
        }
        taken
    }

    /// Where the first free extent begins.
    fn first_free(&self) -> Option<usize> {
        self.free.keys().next().copied()
    }

    /// Adds a free extent, and merges it with its neighbours.
    fn insert(&mut self, mut start: usize, mut end: usize) {
        let before = self.free.range(..start).next_back();
        let before = before.map(|(start, end)| (*start, *end));
        debug_assert!(before.is_none_or(|(_, end)| end <= start), "freed twice");
        debug_assert!(self.free.range(start..end).next().is_none(), "freed twice");
        if let Some((first, _)) = before.filter(|(_, end)| *end == start) {
            self.free.remove(&first);
            start = first;
        }
        if let Some(last) = self.free.remove(&end) {
            end = last;
        }
        self.free.insert(start, end);
    }
}

/// The books of one store.
#[derive(Debug)]
pub(super) struct Books {
    limit_bytes: usize,
    pieces: BTreeMap<PieceNumber, PieceBooks>,
    made: PieceNumber,
    /// The sizes of all pieces, those included that are about to go.
    registered_bytes: usize,
    /// The pieces that are about to go.
    leaving: BTreeMap<PieceNumber, usize>,
    taken_bytes: usize,
    promised_bytes: usize,
}

impl Books {
    /// The limit is rounded down to whole units.
    pub(super) fn new(limit_bytes: usize) -> Self {
        Self {
            limit_bytes: limit_bytes / UNIT_BYTES * UNIT_BYTES,
            pieces: BTreeMap::new(),
            made: 0,
            registered_bytes: 0,
            leaving: BTreeMap::new(),
            taken_bytes: 0,
            promised_bytes: 0,
        }
    }

    pub(super) fn set_limit(&mut self, limit_bytes: usize) {
        self.limit_bytes = limit_bytes / UNIT_BYTES * UNIT_BYTES;
    }

    pub(super) fn limit_bytes(&self) -> usize {
        self.limit_bytes
    }

    pub(super) fn is_above_limit(&self) -> bool {
        self.registered_bytes > self.limit_bytes
    }

    pub(super) fn stats(&self) -> HostStoreStats {
        HostStoreStats {
            limit_bytes: self.limit_bytes,
            registered_bytes: self.registered_bytes,
            in_use_bytes: self.taken_bytes + self.promised_bytes,
            pieces: self.pieces.len() + self.leaving.len(),
        }
    }

    /// Promises bytes, a multiple of the unit, to a caller that then takes them or cancels.
    pub(super) fn promise(&mut self, bytes: usize) -> Result<()> {
        let in_use_bytes = self.taken_bytes + self.promised_bytes;
        if bytes > self.limit_bytes.saturating_sub(in_use_bytes) {
            return Err(VmmError::HostStoreFull {
                needed_bytes: bytes,
                in_use_bytes,
                limit_bytes: self.limit_bytes,
            });
        }
        self.promised_bytes += bytes;
        Ok(())
    }

    /// Takes back a promise.
    pub(super) fn cancel(&mut self, bytes: usize) {
        self.promised_bytes -= bytes;
    }

    /// Takes promised bytes from what is free: the first extent that has room for all, or else one
    /// extent after the other. Returns how many bytes that were.
    pub(super) fn take(&mut self, bytes: usize, taken: &mut Vec<PieceExtent>) -> usize {
        let fitting = self.first_fitting(bytes);
        let mut left = bytes;
        for (number, piece) in &mut self.pieces {
            let mut next = match fitting {
                Some((other, _)) if other != *number => None,
                Some((_, start)) => Some(start),
                None => piece.first_free(),
            };
            while let Some(offset) = next.filter(|_| left > 0) {
                let bytes = piece.take(offset, left);
                left -= bytes;
                taken.push(PieceExtent {
                    piece: *number,
                    offset,
                    bytes,
                });
                next = piece.first_free();
            }
        }
        let bytes = bytes - left;
        self.promised_bytes -= bytes;
        self.taken_bytes += bytes;
        bytes
    }

    /// The first free extent that has room for all of these bytes.
    fn first_fitting(&self, bytes: usize) -> Option<(PieceNumber, usize)> {
        self.pieces.iter().find_map(|(number, piece)| {
            let mut extents = piece.free.iter();
            let (start, _) = extents.find(|(start, end)| *end - *start >= bytes)?;
            Some((*number, *start))
        })
    }

    /// Returns extents that were taken.
    pub(super) fn give_back(&mut self, extents: &[PieceExtent]) {
        for extent in extents {
            let piece = self.pieces.get_mut(&extent.piece);
            debug_assert!(piece.is_some(), "a piece with taken bytes stays");
            if let Some(piece) = piece {
                piece.insert(extent.offset, extent.offset + extent.bytes);
                self.taken_bytes -= extent.bytes;
            }
        }
    }

    /// The sizes of pieces to make for promised bytes for which nothing is free. They are of
    /// `piece_bytes`, or smaller if the limit asks for that.
    pub(super) fn sizes_to_make(
        &self,
        missing_bytes: usize,
        piece_bytes: usize,
    ) -> impl Iterator<Item = usize> + use<> {
        let room = self.limit_bytes.saturating_sub(self.registered_bytes);
        // A promise is kept, though the limit was lowered meanwhile.
        let mut room = room.max(missing_bytes);
        let mut missing_bytes = missing_bytes;
        core::iter::from_fn(move || {
            let bytes = piece_bytes.min(room);
            room -= bytes;
            let is_over = missing_bytes == 0;
            missing_bytes = missing_bytes.saturating_sub(bytes);
            (!is_over).then_some(bytes)
        })
    }

    /// Adds a piece, all of which is free.
    pub(super) fn add(&mut self, bytes: usize) -> PieceNumber {
        let number = self.made;
        self.made += 1;
        self.pieces.insert(number, PieceBooks::new(bytes));
        self.registered_bytes += bytes;
        number
    }

    /// Takes out pieces of which nothing is in use, the last first, while more than `down_to_bytes`
    /// are registered. Each of them counts until it is [`gone`](Self::gone).
    pub(super) fn take_out(&mut self, down_to_bytes: usize) -> Vec<PieceNumber> {
        let mut left_bytes = self.registered_bytes - self.leaving.values().sum::<usize>();
        let mut out = Vec::new();
        for (number, piece) in self.pieces.iter().rev() {
            if left_bytes <= down_to_bytes {
                break;
            }
            if piece.is_empty() {
                left_bytes -= piece.bytes;
                out.push(*number);
            }
        }
        for number in &out {
            if let Some(piece) = self.pieces.remove(number) {
                self.leaving.insert(*number, piece.bytes);
            }
        }
        out
    }

    /// A piece that was taken out is no longer registered.
    pub(super) fn gone(&mut self, number: PieceNumber) {
        if let Some(bytes) = self.leaving.remove(&number) {
            self.registered_bytes -= bytes;
        }
    }

    /// A piece that was taken out is still registered, so it can be used again.
    pub(super) fn put_back(&mut self, number: PieceNumber) {
        if let Some(bytes) = self.leaving.remove(&number) {
            self.pieces.insert(number, PieceBooks::new(bytes));
        }
    }
}

#[cfg(test)]
mod tests;
