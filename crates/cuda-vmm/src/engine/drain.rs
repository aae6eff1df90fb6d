//! Giving memory back, to the cache or to the driver: the way of freed memory.
//!
//! ```text
//!  deallocate            the range records what has to be past; the chunk retires
//!  all of it is past     a step, or a call that needs memory, parks the chunk
//!  park_bytes_max        a step takes parked chunks out above it, down to `park_bytes_min`:
//!    is exceeded           the cache has room: overwrite, retire, park, unmap, put in the cache
//!                          otherwise:          unmap, release to the driver
//!  memory is short       memory made ahead, then the cache, then parked chunks:
//!                          one piece at a time, unmapped and released to the driver
//! ```
//!
//! The books give the pages of a draining chunk to nobody else, so no lock is held over the driver
//! calls. A chunk that the driver refuses to unmap is quarantined. Memory that it unmaps but does
//! not release stays charged. Both are retried; see `refused`.

use super::books::pages::Contents;
use super::range::Range;
use super::ranges::RangeGuard;
use super::retire::Until;
use super::{AtWork, Inner, Locked, RangeId, State};
use crate::sync::Arc;
use crate::{CloseError, Mapping, MemoryParts, PhysicalMemory, Result, Stream};

/// A chunk that is draining, in the hands of the thread that gives it back.
pub(super) struct Drained {
    range: RangeId,
    first: usize,
    mapping: Mapping,
    work: AtWork,
}

impl RangeGuard<'_> {
    /// Takes out a parked or quarantined chunk. That serves nobody yet: what comes of it is told.
    pub(super) fn drain(&mut self, id: RangeId, first: usize) -> Option<Drained> {
        let mapping = self.quietly().pages.drain(first)?;
        Some(Drained {
            range: id,
            first,
            mapping,
            work: AtWork::begin(),
        })
    }
}

/// Where the memory of a chunk goes when it is unmapped.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum To {
    Cache,
    Driver,
}

/// Memory that is mapped no longer.
enum Released {
    Cached(PhysicalMemory),
    Closed(Result<(), CloseError<PhysicalMemory>>),
}

/// What is to be done with one parked chunk.
enum Next {
    Unmap(Drained, To),
    /// Overwrite it, so that it can go to the cache.
    Scrub(Drained),
}

impl Inner {
    /// Gives back parked chunks of ranges that are closed, and, where more is parked than may be, of others too;
    /// returns the bytes that are no longer parked.
    pub(super) fn give_back(self: &Arc<Self>) -> usize {
        // Once it is too much, down to the low watermark: else each free would call the driver for itself.
        let mut keep_bytes = self.options.park_bytes_max;
        let mut given_bytes = 0;
        loop {
            let state = self.lock();
            let stale = state.take_ahead(None, Range::stale_ahead);
            if let Some(chunk) = stale {
                drop(state);
                let unmapped = self.unmap(chunk, To::Driver);
                given_bytes += unmapped.unwrap_or_default();
                continue;
            }
            if let Some(id) = state.spare_above_ceiling() {
                match self.give_up_one(state, Some(id)) {
                    Some(outcome) => given_bytes += outcome.unwrap_or_default(),
                    None => return given_bytes,
                }
                continue;
            }
            // What is attended goes by itself, and no other range has to give up anything for it.
            let ranges = state.ranges.values().filter(|range| !range.attended);
            let parked_bytes: usize = ranges.map(|range| range.spare_parked_bytes()).sum();
            let too_much = parked_bytes > keep_bytes;
            if too_much {
                keep_bytes = self.options.park_low_bytes();
            }
            let Some(next) = self.next_parked(&state, too_much) else {
                return given_bytes;
            };
            drop(state);
            match next {
                Next::Unmap(chunk, to) => {
                    let unmapped = self.unmap(chunk, to);
                    given_bytes += unmapped.unwrap_or_default();
                }
                Next::Scrub(chunk) => self.scrub(chunk),
            }
        }
    }

    /// Takes one parked chunk: of a closed range, or, if there is too much, of any; but of none that is attended.
    fn next_parked(&self, state: &State, too_much: bool) -> Option<Next> {
        let room_bytes = self
            .options
            .cache_bytes_max
            .saturating_sub(state.cache.bytes() + state.queue.scrubbing_bytes());
        let ranges = state.ranges.iter();
        ranges
            .filter(|(_, range)| !range.attended && (too_much || range.closed))
            .find_map(|(id, mut range)| {
                let first = range.quietly().spare_parked()?;
                let bytes = range.pages.chunk_bytes(first);
                let contents = range.pages.contents(first);
                let chunk = range.drain(id, first)?;
                Some(match contents {
                    Contents::Unknown if bytes <= room_bytes && !range.closed => Next::Scrub(chunk),
                    Contents::Clean if bytes <= room_bytes => Next::Unmap(chunk, To::Cache),
                    _ => Next::Unmap(chunk, To::Driver),
                })
            })
    }

    /// Overwrites a draining chunk with zeros on a stream of the engine's own; it is retiring until that is past, and
    /// then parked and clean. Where it cannot be overwritten it is parked for the driver.
    fn scrub(self: &Arc<Self>, chunk: Drained) {
        let Drained {
            range: id,
            first,
            mapping,
            work,
        } = chunk;
        let fence = self
            .scrubbing_stream()
            .and_then(|stream| mapping.scrub(&stream));
        let bytes = mapping.bytes();
        let mut state = self.lock();
        // The range cannot have gone: it ends with its last chunk.
        let Some(mut range) = state.ranges.get(id) else {
            return;
        };
        range.pages.retire_drained(first, mapping, fence.is_ok());
        drop(range);
        let mut refused = None;
        match fence {
            Ok(fence) => {
                state.counters.scrubbed_bytes += bytes as u64;
                let until = Until::Fences(Arc::new(vec![Arc::new(fence)]));
                state.queue.push_scrub(id, first, bytes, until);
            }
            Err(error) => {
                // The zeros may be queued without a fence.
                state.queue.push(id, vec![first], Until::Synchronised);
                refused = Some(error);
            }
        }
        drop((work, state));
        if let Some(error) = refused {
            crate::events::debug!(%error, "memory could not be overwritten, and is not kept");
        }
        self.worker.wake(self, false);
    }

    fn scrubbing_stream(&self) -> Result<Stream> {
        if let Some(stream) = &self.lock().scrubbing {
            return Ok(stream.clone());
        }
        // Two threads may each make one. The second is destroyed again, which calls the driver, without the lock.
        let stream = Stream::new(&self.device)?;
        let kept = self
            .lock()
            .scrubbing
            .get_or_insert_with(|| stream.clone())
            .clone();
        Ok(kept)
    }

    /// Gives back what can be spared, one piece after the other, until it is enough: what was made ahead, what is
    /// cached, unless only one range's memory would help, and then what is parked. Returns the bytes that went, and the
    /// last error if the driver refused some.
    pub(super) fn give_up(
        self: &Arc<Self>,
        only: Option<RangeId>,
        enough: impl Fn(&MemoryParts) -> bool,
    ) -> (usize, Result<()>) {
        let (mut given_bytes, mut outcome) = (0, Ok(()));
        loop {
            let state = self.lock();
            if enough(&state.parts()) {
                break;
            }
            match self.give_up_one(state, only) {
                None => break,
                Some(Ok(bytes)) => given_bytes += bytes,
                Some(Err(error)) => outcome = Err(error),
            }
        }
        (given_bytes, outcome)
    }

    /// Gives back one piece; `None` if there is none to spare.
    pub(super) fn give_up_one(
        self: &Arc<Self>,
        mut state: Locked<'_>,
        only: Option<RangeId>,
    ) -> Option<Result<usize>> {
        let ahead = state.take_ahead(only, |range| range.pages.ahead().next_back());
        if let Some(chunk) = ahead {
            drop(state);
            return Some(self.unmap(chunk, To::Driver));
        }
        if only.is_none()
            && let Some((bytes, memory)) = state.cache.take_largest()
        {
            state.releasing.push((None, bytes));
            let _work = AtWork::begin();
            drop(state);
            return Some(self.release(None, memory));
        }
        let ranges = state.ranges.iter();
        let mut ranges = ranges.filter(|(id, _)| only.is_none_or(|only| *id == only));
        let spare = ranges.find_map(|(id, mut range)| {
            let first = range.quietly().spare_parked()?;
            range.drain(id, first)
        });
        drop(ranges);
        let chunk = spare?;
        drop(state);
        Some(self.unmap(chunk, To::Driver))
    }

    /// Unmaps one draining chunk and gives its memory to the cache or the driver. What the driver refuses stays
    /// charged, in quarantine.
    pub(super) fn unmap(self: &Arc<Self>, chunk: Drained, to: To) -> Result<usize> {
        let Drained {
            range: id,
            first,
            mapping,
            work,
        } = chunk;
        let bytes = mapping.bytes();
        let unmapped = mapping.unmap();
        let released = match unmapped {
            Ok(memory) => Ok(Arc::into_inner(memory).map(|memory| match to {
                To::Cache => Released::Cached(memory),
                To::Driver => Released::Closed(memory.close()),
            })),
            Err(failure) => Err(failure),
        };
        let mut state = self.lock();
        let State {
            ranges,
            ledger,
            cache,
            unreleased,
            ..
        } = &mut *state;
        let Some(mut range) = ranges.get(id) else {
            return Ok(0);
        };
        let account = range.account;
        let outcome = match released {
            Err(failure) => {
                range.pages.quarantine(first, failure.object);
                Err(failure.error)
            }
            Ok(released) => {
                range.pages.drained(first);
                match released {
                    Some(Released::Cached(memory)) => {
                        ledger.put_in_cache(account, bytes);
                        cache.put(bytes, memory);
                        Ok(bytes)
                    }
                    Some(Released::Closed(Err(failure))) => {
                        unreleased.push((Some(account), failure.object));
                        Err(failure.error)
                    }
                    Some(Released::Closed(Ok(()))) | None => {
                        ledger.refund(account, bytes);
                        Ok(bytes)
                    }
                }
            }
        };
        drop((work, range));
        self.note_refusal(state, outcome.as_ref().err(), bytes);
        outcome
    }
}
