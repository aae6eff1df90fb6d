//! The pieces of a store and their books, behind one lock.
//!
//! No lock is held while memory is made or given back. One thread does either at a time: it has the
//! *turn*. A thread that needs memory for which nothing is free waits for its turn, and meanwhile
//! takes what others give back. A thread that has the turn waits for no other, so the turn ends.
#![forbid(unsafe_code)]

use super::books::{Books, PieceExtent, PieceNumber};
use super::options::HostStoreOptions;
use super::piece::Piece;
use super::stats::HostStoreStats;
use crate::process::Here;
use crate::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use crate::{Device, Result};
use std::collections::BTreeMap;

#[derive(Debug)]
pub(super) struct Store {
    pub(super) device: Device,
    pub(super) options: HostStoreOptions,
    state: Here<Mutex<State>>,
    /// Notified when a turn ends and when bytes are given back.
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    books: Books,
    /// Those of the books, except those that are about to go.
    pieces: BTreeMap<PieceNumber, Piece>,
    is_turn_taken: bool,
}

impl State {
    fn add(&mut self, piece: Piece) {
        let number = self.books.add(piece.bytes());
        self.pieces.insert(number, piece);
    }

    /// Takes out pieces of which nothing is in use, while more than `down_to_bytes` are registered.
    fn take_out(&mut self, down_to_bytes: usize) -> Vec<(PieceNumber, Piece)> {
        let numbers = self.books.take_out(down_to_bytes).into_iter();
        let out = numbers.filter_map(|number| Some((number, self.pieces.remove(&number)?)));
        out.collect()
    }

    fn place(&self, extents: Vec<PieceExtent>) -> Vec<Place> {
        let place = |extent: PieceExtent| {
            let piece = self.pieces.get(&extent.piece)?;
            let address = piece.address() + extent.offset;
            Some(Place { address, extent })
        };
        extents.into_iter().filter_map(place).collect()
    }
}

/// Bytes of a piece that are taken, and where they are. They stay there until they are given back.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) address: usize,
    pub(super) extent: PieceExtent,
}

/// The turn of a thread. [`Store::end`] ends it, and so does dropping it.
struct Turn<'a>(&'a Store);

impl Turn<'_> {
    fn end(self, mut state: MutexGuard<'_, State>) {
        state.is_turn_taken = false;
        self.0.changed.notify_all();
        core::mem::forget(self);
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Ok(mut state) = self.0.state.lock() {
            state.is_turn_taken = false;
            self.0.changed.notify_all();
        }
    }
}

impl Store {
    pub(super) fn new(device: &Device, limit_bytes: usize, options: HostStoreOptions) -> Self {
        let state = State {
            books: Books::new(limit_bytes),
            pieces: BTreeMap::new(),
            is_turn_taken: false,
        };
        Self {
            device: device.clone(),
            options,
            state: Here::new(device.driver().process(), Mutex::new(state)),
            changed: Condvar::new(),
        }
    }

    /// Fails in a forked process.
    pub(super) fn check_process(&self) -> Result<()> {
        self.state.get().map(drop)
    }

    pub(super) fn stats(&self) -> HostStoreStats {
        let state = self.state.lock();
        state.map_or_else(|_| HostStoreStats::default(), |state| state.books.stats())
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let woken = self.changed.wait(state);
        woken.unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves bytes, a multiple of the unit.
    pub(super) fn reserve(&self, bytes: usize) -> Result<Vec<Place>> {
        let mut state = self.state.lock()?;
        state.books.promise(bytes)?;
        let (mut extents, mut missing) = (Vec::new(), bytes);
        loop {
            missing -= state.books.take(missing, &mut extents);
            if missing == 0 {
                return Ok(state.place(extents));
            }
            if !state.is_turn_taken {
                break;
            }
            state = self.wait(state);
        }
        state.is_turn_taken = true;
        let sizes = state.books.sizes_to_make(missing, self.options.piece_bytes);
        drop(state);

        let turn = Turn(self);
        let (pieces, outcome) = self.make(sizes);
        let mut state = self.state.lock()?;
        pieces.into_iter().for_each(|piece| state.add(piece));
        if let Err(error) = outcome {
            state.books.give_back(&extents);
            state.books.cancel(missing);
            drop(state);
            self.end(turn);
            return Err(error);
        }
        state.books.take(missing, &mut extents);
        let places = state.place(extents);
        drop(state);
        self.end(turn);
        Ok(places)
    }

    /// Makes pieces of these sizes, or none. If the driver refuses to take one back that was made
    /// before another failed, that piece is returned with the error.
    fn make(&self, sizes: impl Iterator<Item = usize>) -> (Vec<Piece>, Result<()>) {
        let mut pieces = Vec::new();
        for bytes in sizes {
            match Piece::new(&self.device, bytes, self.options.threads) {
                Ok(piece) => pieces.push(piece),
                Err(error) => {
                    let closed = pieces.into_iter().map(Piece::close);
                    let refused = closed.filter_map(|closed| closed.err().map(|(_, piece)| piece));
                    return (refused.collect(), Err(error));
                }
            }
        }
        (pieces, Ok(()))
    }

    /// Gives reserved bytes back. In a forked process it does nothing.
    pub(super) fn give_back(&self, places: &[Place]) {
        let Ok(mut state) = self.state.lock() else {
            return;
        };
        let extents: Vec<_> = places.iter().map(|place| place.extent).collect();
        state.books.give_back(&extents);
        self.changed.notify_all();
        // A thread that has the turn does this when it ends.
        if state.books.is_above_limit() && !state.is_turn_taken {
            state.is_turn_taken = true;
            drop(state);
            self.end(Turn(self));
        }
    }

    /// Sets the limit, and gives back what is free above it.
    pub(super) fn set_limit(&self, limit_bytes: usize) -> Result<()> {
        let mut state = self.state.lock()?;
        state.books.set_limit(limit_bytes);
        drop(state);
        let turn = self.turn()?;
        self.end(turn);
        Ok(())
    }

    /// Gives back all pieces of which nothing is in use. Returns their bytes.
    pub(super) fn trim(&self) -> Result<usize> {
        let turn = self.turn()?;
        let out = self.state.lock()?.take_out(0);
        let closed = self.close(out);
        self.end(turn);
        closed
    }

    /// Waits for the turn.
    fn turn(&self) -> Result<Turn<'_>> {
        let mut state = self.state.lock()?;
        while state.is_turn_taken {
            state = self.wait(state);
        }
        state.is_turn_taken = true;
        Ok(Turn(self))
    }

    /// Ends a turn. Before, gives back pieces of which nothing is in use while more is registered
    /// than the limit allows, unless the driver refuses.
    fn end(&self, turn: Turn<'_>) {
        let mut is_refused = false;
        while let Ok(mut state) = self.state.lock() {
            let limit_bytes = state.books.limit_bytes();
            let out = match is_refused {
                true => Vec::new(),
                false => state.take_out(limit_bytes),
            };
            if out.is_empty() {
                // Under the same lock as the look. So a thread that gives bytes back later sees
                // that no thread has the turn, and takes it.
                return turn.end(state);
            }
            drop(state);
            is_refused = self.close(out).is_err();
        }
    }

    /// Gives pieces that were taken out back to the system. Returns their bytes. What the driver
    /// refuses is in the store again. The caller has the turn.
    fn close(&self, out: Vec<(PieceNumber, Piece)>) -> Result<usize> {
        let (mut closed_bytes, mut refusal) = (0, None);
        for (number, piece) in out {
            let bytes = piece.bytes();
            let closed = piece.close();
            let mut state = self.state.lock()?;
            match closed {
                Ok(()) => {
                    closed_bytes += bytes;
                    state.books.gone(number);
                }
                Err((error, piece)) => {
                    state.books.put_back(number);
                    state.pieces.insert(number, piece);
                    refusal.get_or_insert(error);
                }
            }
        }
        refusal.map_or(Ok(closed_bytes), Err)
    }
}
