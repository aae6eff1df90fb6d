//! Trying again what the driver refused to take back.

use super::at_work::AtWork;
use super::books::pages::ChunkState;
use super::books::range_id::RangeId;
use super::books::refusals::Refusals;
use super::books::tally::Fact;
use super::drain::To;
use super::inner::Inner;
use super::state::State;
use super::stranded;
use crate::Result;
use crate::sync::{self, Arc};
use core::ops::Range;
use core::time::Duration;

/// What is to be tried again.
#[derive(Debug, Clone)]
pub(crate) enum Which {
    /// What is due, until the driver refuses a piece.
    Due,
    /// Everything, now, until the driver refuses a piece.
    Wanted,
    /// Everything, now.
    All,
    /// What is in the way at these pages of a range, now.
    At(RangeId, Range<usize>),
}

/// Something that the driver refused to take back, or to put in its place.
#[derive(Debug, Clone, Copy)]
enum Piece {
    /// The chunk of a range that begins at this page, which is still mapped.
    Chunk(RangeId, usize),
    /// The first of the memory that is mapped nowhere.
    Unreleased,
    /// The first of what moves have left at scratch addresses.
    Stuck,
    /// The first of the chunks that are neither moved nor in their place.
    Stranded,
}

impl State {
    /// When the worker is to try again what was refused; `None` if nothing was.
    pub(crate) fn retry_in(&mut self) -> Option<Duration> {
        self.is_any_refused()
            .then(|| self.refusals.left(sync::now()))
    }

    fn refused(&mut self, which: &Which) -> Vec<Piece> {
        if let Which::Due = which
            && !self.refusals.is_due(sync::now())
        {
            return Vec::new();
        }
        self.look_again();
        let mut pieces = Vec::new();
        for (id, range) in self.ranges.with(Fact::Quarantined) {
            let chunks = range.pages.in_state(ChunkState::Quarantined).into_iter();
            let is_meant = |first: &usize| match which {
                Which::At(of, pages) => {
                    let end = first + range.pages.chunk_bytes(*first) / range.page_bytes;
                    *of == id && *first < pages.end && pages.start < end
                }
                _ => true,
            };
            pieces.extend(chunks.filter(is_meant).map(|first| Piece::Chunk(id, first)));
        }
        let (stranded, stuck) = self.relocations.left();
        pieces.extend((0..stranded).map(|_| Piece::Stranded));
        if !matches!(which, Which::At(..)) {
            pieces.extend((0..stuck).map(|_| Piece::Stuck));
            pieces.extend(self.unreleased.iter().map(|_| Piece::Unreleased));
        }
        if matches!(which, Which::Due | Which::Wanted) {
            self.refusals.rotate(&mut pieces);
        }
        pieces
    }
}

impl Piece {
    /// Tries this piece again; returns the bytes that went to the driver.
    fn retry(self, engine: &Arc<Inner>) -> Result<usize> {
        match self {
            Self::Chunk(id, first) => {
                let state = engine.state.lock();
                let range = state.ranges.get(id);
                let chunk = range.and_then(|mut range| {
                    let is_refused = range.pages.state_of(first) == Some(ChunkState::Quarantined);
                    is_refused.then(|| range.drain(id, first))?
                });
                drop(state);
                // Another thread may have been faster.
                chunk.map_or(Ok(0), |chunk| chunk.unmap(engine, To::Driver))
            }
            Self::Unreleased => {
                let mut state = engine.state.lock();
                if state.unreleased.is_empty() {
                    return Ok(0);
                }
                let (owner, memory) = state.unreleased.remove(0);
                state.begin_releasing(owner, memory.bytes());
                let _work = AtWork::begin();
                drop(state);
                engine.release(owner, memory)
            }
            Self::Stuck => stranded::retry_stuck(engine),
            Self::Stranded => stranded::retry_stranded(engine),
        }
    }
}

impl Inner {
    /// Tries again what the driver refused; returns the bytes that went to it.
    pub(crate) fn retry(self: &Arc<Self>, which: &Which) -> usize {
        if self.device.is_lost() {
            return 0;
        }
        let pieces = self.state.lock().quietly().refused(which);
        if pieces.is_empty() {
            return 0;
        }
        crate::events::debug!(
            pieces = pieces.len(),
            "the driver is asked again to take memory back"
        );
        let (mut bytes, mut tries, mut is_refused) = (0, 0, false);
        for piece in pieces {
            tries += 1;
            match piece.retry(self) {
                Ok(given_bytes) => bytes += given_bytes,
                Err(_) => {
                    is_refused = true;
                    if matches!(which, Which::Due | Which::Wanted) {
                        break;
                    }
                }
            }
        }
        let mut state = self.state.lock();
        state.counters.retries += tries;
        let is_over = !state.quietly().is_any_refused();
        let was_told = state.refusals.is_told();
        if is_over {
            state.refusals = Refusals::default();
        } else if is_refused {
            state.refusals.take_turn();
            // Callers that want memory do not put off the worker's next try.
            if !matches!(which, Which::Wanted) {
                state.refusals.fail(sync::now());
            }
        }
        drop(state);
        if is_over && was_told {
            crate::events::info!("the driver has taken back all that it had refused");
        }
        bytes
    }
}
