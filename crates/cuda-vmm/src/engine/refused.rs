//! Memory that the driver refused to take back: kept on its account, tried again with growing delays, told of once.
//!
//! A refusal is news if nothing was refused before. Then there is one warning. The worker hears of each, and tries again when
//! the back-off says so, one piece after the other, until the driver refuses one; so a driver that refuses all is asked once
//! each time, however much there is. Each such try begins with another piece. When nothing is left, there is one message more.
//!
//! Calls that need the memory try at once: about the pages in their way, or until the driver refuses a piece. In a context
//! that is beyond use nobody tries: [`Device::is_lost`] says so.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::books::backoff::Backoff;
use super::books::ledger::AccountId;
use super::books::pages::ChunkState;
use super::drain::To;
use super::{AtWork, Inner, Locked, RangeId, State, take_out};
use crate::sync::{self, Arc};
use crate::{PhysicalMemory, Result, VmmError};
use core::ops::Range;
use core::time::Duration;

/// The delays between two tries of the worker's.
const DELAY: Duration = Duration::from_millis(16);
const DELAY_MAX: Duration = Duration::from_secs(4);

/// What an engine knows of the driver's refusals.
#[derive(Debug)]
pub(super) struct Refusals {
    backoff: Backoff,
    /// Whether it was told that memory is refused.
    is_told: bool,
    /// With which of the pieces the next try begins.
    turn: usize,
}

impl Default for Refusals {
    fn default() -> Self {
        Self {
            backoff: Backoff::new(DELAY, DELAY_MAX),
            is_told: false,
            turn: 0,
        }
    }
}

/// What is to be tried again.
#[derive(Debug, Clone)]
pub(super) enum Which {
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
    pub(super) fn retry_in(&self) -> Option<Duration> {
        let refused_bytes = self.parts().quarantined_bytes;
        (refused_bytes > 0).then(|| self.refusals.backoff.left(sync::now()))
    }

    fn refused(&self, which: &Which) -> Vec<Piece> {
        if let Which::Due = which
            && !self.refusals.backoff.is_due(sync::now())
        {
            return Vec::new();
        }
        let mut pieces = Vec::new();
        for (id, range) in self.ranges.iter() {
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
        if matches!(which, Which::Due | Which::Wanted) && !pieces.is_empty() {
            let turn = self.refusals.turn % pieces.len();
            pieces.rotate_left(turn);
        }
        pieces
    }
}

impl Inner {
    /// Lets go of the lock, after memory was given back or the driver has refused to take it; the first refusal is told, and
    /// the worker woken for each.
    pub(super) fn note_refusal(
        self: &Arc<Self>,
        mut state: Locked<'_>,
        refusal: Option<&VmmError>,
        bytes: usize,
    ) {
        let is_news = refusal.is_some() && !state.refusals.is_told;
        if is_news {
            state.refusals.is_told = true;
            state.refusals.backoff.fail(sync::now());
        }
        drop(state);
        let Some(error) = refusal else {
            return;
        };
        if !is_news {
            crate::events::debug!(%error, bytes, "the driver did not take memory back");
        } else if error.is_poisoned() {
            crate::events::warn!(%error, bytes, "the context is beyond use; its memory is left alone");
        } else {
            crate::events::warn!(%error, bytes, "the driver did not take memory back, which is quarantined and tried again");
        }
        // Each time: it may have looked while this thread had the last of it in hand, and found nothing to try again.
        self.worker.wake(self, false);
    }

    /// Tries again what the driver refused; returns the bytes that went to it.
    pub(super) fn retry(self: &Arc<Self>, which: &Which) -> usize {
        if self.device.is_lost() {
            return 0;
        }
        let pieces = self.lock().refused(which);
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
            match self.retry_one(piece) {
                Ok(given_bytes) => bytes += given_bytes,
                Err(_) => {
                    is_refused = true;
                    if matches!(which, Which::Due | Which::Wanted) {
                        break;
                    }
                }
            }
        }
        let mut state = self.lock();
        state.counters.retries += tries;
        let is_over = state.parts().quarantined_bytes == 0;
        let was_told = state.refusals.is_told;
        if is_over {
            state.refusals = Refusals::default();
        } else if is_refused {
            state.refusals.turn = state.refusals.turn.wrapping_add(1);
            // Callers who want memory do not put off the worker's next try.
            if !matches!(which, Which::Wanted) {
                state.refusals.backoff.fail(sync::now());
            }
        }
        drop(state);
        if is_over && was_told {
            crate::events::info!("the driver has taken back all that it had refused");
        }
        bytes
    }

    fn retry_one(self: &Arc<Self>, piece: Piece) -> Result<usize> {
        match piece {
            Piece::Chunk(id, first) => {
                let state = self.lock();
                let range = state.ranges.get(id);
                let chunk = range.and_then(|mut range| {
                    let is_refused = range.pages.state_of(first) == Some(ChunkState::Quarantined);
                    is_refused.then(|| range.drain(id, first))?
                });
                drop(state);
                // Another thread may have been faster.
                chunk.map_or(Ok(0), |chunk| self.unmap(chunk, To::Driver))
            }
            Piece::Unreleased => {
                let mut state = self.lock();
                if state.unreleased.is_empty() {
                    return Ok(0);
                }
                let (account, memory) = state.unreleased.remove(0);
                state.releasing.push((account, memory.bytes()));
                let _work = AtWork::begin();
                drop(state);
                self.release(account, memory)
            }
            Piece::Stuck => self.retry_stuck(),
            Piece::Stranded => self.retry_stranded(),
        }
    }

    /// Releases memory that is mapped nowhere, and that `releasing` names. What the driver refuses is tried again
    /// later.
    pub(super) fn release(
        self: &Arc<Self>,
        account: Option<AccountId>,
        memory: PhysicalMemory,
    ) -> Result<usize> {
        let bytes = memory.bytes();
        let outcome = memory.close();
        let mut state = self.lock();
        take_out(&mut state.releasing, account, bytes);
        let outcome = match (outcome, account) {
            (Ok(()), Some(account)) => {
                state.ledger.refund(account, bytes);
                Ok(bytes)
            }
            (Ok(()), None) => {
                state.ledger.take_from_cache(bytes);
                Ok(bytes)
            }
            (Err(failure), _) => {
                state.unreleased.push((account, failure.object));
                Err(failure.error)
            }
        };
        self.note_refusal(state, outcome.as_ref().err(), bytes);
        outcome
    }
}
