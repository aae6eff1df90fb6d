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
//! The books give the pages of a draining chunk to no other thread, so no lock is held over the
//! driver calls. A chunk that the driver refuses to unmap is quarantined. Memory that it unmaps but
//! does not release stays charged. Both are retried; see `refused`.

use super::at_work::AtWork;
use super::books::pages::Contents;
use super::books::range_id::RangeId;
use super::books::tally::Fact;
use super::changes::Locked;
use super::inner::Inner;
use super::options::EngineOptions;
use super::queue::Until;
use super::ranges::RangeGuard;
use super::scope::Scope;
use super::state::State;
use crate::sync::Arc;
use crate::{CloseError, Fence, Mapping, MemoryParts, PhysicalMemory, Result, Stream};

/// A chunk that is draining, in the hands of the thread that gives it back.
pub(crate) struct Drained {
    range: RangeId,
    first: usize,
    mapping: Mapping,
    /// Whether other ranges map its memory too.
    is_shared: bool,
    work: AtWork,
}

impl RangeGuard<'_> {
    /// Takes out a parked or quarantined chunk. That serves no other thread yet, so it is no
    /// change.
    pub(crate) fn drain(&mut self, id: RangeId, first: usize) -> Option<Drained> {
        let is_shared = self.pages.is_shared(first);
        let mapping = self.quietly().pages.drain(first)?;
        Some(Drained {
            range: id,
            first,
            mapping,
            is_shared,
            work: AtWork::begin(),
        })
    }
}

/// Where the memory of a chunk goes when it is unmapped.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum To {
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

/// What came of giving up one piece of memory.
pub(crate) enum GivenUp<'a> {
    /// There was none to spare.
    Nothing(Locked<'a>),
    /// Its bytes went, or the driver refused it.
    Piece(Result<usize>),
}

impl State {
    /// Takes out a chunk made ahead, of one range or of all, to be unmapped.
    fn take_ahead(&mut self, scope: Scope) -> Option<Drained> {
        self.look_again();
        let mut ranges = self.ranges.with_within(Fact::Ahead, scope);
        ranges.find_map(|(id, mut range)| {
            let first = range.pages.ahead().next_back()?;
            range.drain(id, first)
        })
    }

    /// Takes out a chunk made ahead at a place that allocations have left, to be unmapped.
    fn take_stale_ahead(&mut self) -> Option<Drained> {
        self.look_again();
        let mut ranges = self.ranges.with(Fact::StaleAhead);
        ranges.find_map(|(id, mut range)| {
            let first = range.stale_ahead()?;
            range.drain(id, first)
        })
    }

    /// Takes out a mapping of a shared chunk that is only to be unmapped.
    fn take_leaving(&mut self, scope: Scope) -> Option<Drained> {
        self.look_again();
        let mut ranges = self.ranges.with_within(Fact::Leaving, scope);
        ranges.find_map(|(id, mut range)| {
            let first = range.leaving()?;
            range.drain(id, first)
        })
    }

    /// Takes out a parked chunk that no pin keeps, of one range or of all, to be unmapped.
    fn take_parked(&mut self, scope: Scope) -> Option<Drained> {
        self.look_again();
        let mut ranges = self.ranges.with_within(Fact::Parked, scope);
        ranges.find_map(|(id, mut range)| {
            let first = range.quietly().spare_parked()?;
            range.drain(id, first)
        })
    }

    /// Takes one parked chunk: of a closed range, or, if there is too much, of any; but of none
    /// that a thread is closing. The closing thread gives back its range itself, and no other range
    /// gives up anything for it.
    fn next_parked(&mut self, options: &EngineOptions, too_much: bool) -> Option<Next> {
        self.look_again();
        let held_bytes = self.cache.bytes() + self.queue.scrubbing_bytes();
        let room_bytes = options.cache_bytes_max.saturating_sub(held_bytes);
        let ranges = self.ranges.with(match too_much {
            true => Fact::Parked,
            false => Fact::ParkedAndLeft,
        });
        ranges
            .filter(|(_, range)| !range.has_closer && (too_much || range.keeps_nothing()))
            .find_map(|(id, mut range)| {
                let first = range.quietly().spare_parked()?;
                let bytes = range.pages.chunk_bytes(first);
                let contents = range.pages.contents(first);
                let chunk = range.drain(id, first)?;
                Some(match contents {
                    Contents::Unknown if bytes <= room_bytes && !range.keeps_nothing() => {
                        Next::Scrub(chunk)
                    }
                    Contents::Clean if bytes <= room_bytes => Next::Unmap(chunk, To::Cache),
                    _ => Next::Unmap(chunk, To::Driver),
                })
            })
    }
}

impl Inner {
    /// Gives back parked chunks of ranges that are closed, and, if more is parked than may be, of
    /// others too; returns the bytes that are no longer parked.
    pub(crate) fn give_back(self: &Arc<Self>) -> usize {
        self.unmap_leaving(Scope::All);
        // Once it is too much, down to the low watermark: else each free would call the driver for
        // itself.
        let mut keep_bytes = self.options.park_bytes_max;
        let mut given_bytes = 0;
        loop {
            let mut state = self.state.lock();
            if let Some(chunk) = state.quietly().take_stale_ahead() {
                drop(state);
                given_bytes += chunk.unmap(self, To::Driver).unwrap_or_default();
                continue;
            }
            if let Some(scope) = state.quietly().spare_when_over() {
                match self.give_up_one(state, scope) {
                    GivenUp::Piece(outcome) => given_bytes += outcome.unwrap_or_default(),
                    GivenUp::Nothing(_) => return given_bytes,
                }
                continue;
            }
            // Of a range that a thread is closing, none.
            let parked_bytes = state.quietly().look_again().left_parked_bytes();
            let too_much = parked_bytes > keep_bytes;
            if too_much {
                keep_bytes = self.options.park_low_bytes();
            }
            let Some(next) = state.quietly().next_parked(&self.options, too_much) else {
                return given_bytes;
            };
            drop(state);
            match next {
                Next::Unmap(chunk, to) => {
                    let id = chunk.range;
                    given_bytes += chunk.unmap(self, to).unwrap_or_default();
                    // Its next allocations may want the page.
                    if let Some(mut range) = self.state.lock().ranges.get(id) {
                        range.quietly().look_ahead();
                    }
                }
                Next::Scrub(chunk) => chunk.scrub(self),
            }
        }
    }

    /// Gives back what can be spared, one piece after the other, until it is enough: what was made
    /// ahead, what is cached, unless only one range's memory would help, and then what is parked.
    /// Returns the bytes that went, and the last error if the driver refused some.
    pub(crate) fn give_up(
        self: &Arc<Self>,
        scope: Scope,
        enough: impl Fn(&MemoryParts) -> bool,
    ) -> (usize, Result<()>) {
        let (mut given_bytes, mut outcome) = (0, Ok(()));
        loop {
            let mut state = self.state.lock();
            if enough(&state.quietly().parts()) {
                break;
            }
            match self.give_up_one(state, scope) {
                GivenUp::Nothing(_) => break,
                GivenUp::Piece(Ok(bytes)) => given_bytes += bytes,
                GivenUp::Piece(Err(error)) => outcome = Err(error),
            }
        }
        (given_bytes, outcome)
    }

    /// Unmaps the mappings of shared chunks that are only to be unmapped. Their memory goes with
    /// the last of them. Returns whether there were any.
    pub(crate) fn unmap_leaving(self: &Arc<Self>, scope: Scope) -> bool {
        let mut any = false;
        loop {
            let mut state = self.state.lock();
            let Some(chunk) = state.quietly().take_leaving(scope) else {
                return any;
            };
            drop(state);
            any = true;
            // What the driver refuses is quarantined, and retried.
            let _ = chunk.unmap(self, To::Driver);
        }
    }

    /// Gives back one piece, if there is one to spare.
    pub(crate) fn give_up_one<'a>(
        self: &Arc<Self>,
        mut state: Locked<'a>,
        scope: Scope,
    ) -> GivenUp<'a> {
        if let Some(chunk) = state.quietly().take_leaving(scope) {
            drop(state);
            return GivenUp::Piece(chunk.unmap(self, To::Driver));
        }
        if let Some(chunk) = state.quietly().take_ahead(scope) {
            drop(state);
            return GivenUp::Piece(chunk.unmap(self, To::Driver));
        }
        // Asked first, since an access for a change tells others.
        if scope == Scope::All
            && state.cache.bytes() > 0
            && let Some((bytes, memory)) = state.cache.take_largest()
        {
            state.begin_releasing(None, bytes);
            let _work = AtWork::begin();
            drop(state);
            return GivenUp::Piece(self.release(None, memory));
        }
        let Some(chunk) = state.quietly().take_parked(scope) else {
            return GivenUp::Nothing(state);
        };
        drop(state);
        GivenUp::Piece(chunk.unmap(self, To::Driver))
    }
}

impl Drained {
    /// Unmaps the chunk and gives its memory to the cache or the driver. What the driver refuses
    /// stays charged, in quarantine.
    pub(crate) fn unmap(self, engine: &Arc<Inner>, to: To) -> Result<usize> {
        let Self {
            range: id,
            first,
            mapping,
            is_shared,
            work,
        } = self;
        if is_shared {
            return engine.unmap_shared((id, first), mapping, work);
        }
        let bytes = mapping.bytes();
        let released = mapping.unmap().map(|memory| {
            Arc::into_inner(memory).map(|memory| match to {
                To::Cache => Released::Cached(memory),
                To::Driver => Released::Closed(memory.close()),
            })
        });
        let mut state = engine.state.lock();
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
        let owner = range.owner(id);
        let released = released.inspect(|_| range.pages.drained(first));
        let outcome = match released {
            Err(failure) => {
                range.pages.quarantine(first, failure.object);
                Err(failure.error)
            }
            Ok(Some(Released::Cached(memory))) => {
                ledger.put_in_cache(owner.account, bytes);
                cache.put(bytes, memory);
                Ok(bytes)
            }
            Ok(Some(Released::Closed(Err(failure)))) => {
                unreleased.push((Some(owner), failure.object));
                Err(failure.error)
            }
            Ok(Some(Released::Closed(Ok(()))) | None) => {
                ledger.refund(owner.account, bytes);
                Ok(bytes)
            }
        };
        drop((work, range));
        engine.note_refusal(state, outcome.as_ref().err(), bytes);
        outcome
    }

    /// Overwrites the chunk with zeros on a stream of the engine's own. It is retiring until that
    /// is past, and then parked and clean. If it cannot be overwritten it is parked for the driver.
    fn scrub(self, engine: &Arc<Inner>) {
        let Self {
            range: id,
            first,
            mapping,
            is_shared: _,
            work,
        } = self;
        let fence = scrubbing_stream(engine).and_then(|stream| mapping.scrub(&stream));
        let bytes = mapping.bytes();
        let mut state = engine.state.lock();
        // The range cannot have gone: it ends with its last chunk.
        let Some(mut range) = state.ranges.get(id) else {
            return;
        };
        range.pages.retire_drained(first, mapping, fence.is_ok());
        drop(range);
        let refused = state.queue_scrub(id, first, bytes, fence).err();
        drop((work, state));
        if let Some(error) = refused {
            crate::events::debug!(%error, "memory could not be overwritten, and is not kept");
        }
        engine.worker.wake(engine, false);
    }
}

impl State {
    /// Puts a chunk into the queue that is being overwritten until the fence, or that could not be.
    fn queue_scrub(
        &mut self,
        id: RangeId,
        first: usize,
        bytes: usize,
        fence: Result<Fence>,
    ) -> Result<()> {
        match fence {
            Ok(fence) => {
                self.counters.scrubbed_bytes += bytes as u64;
                let until = Until::Fences(Arc::new(vec![Arc::new(fence)]));
                self.queue.push_scrub(id, first, bytes, until);
                Ok(())
            }
            Err(error) => {
                // The zeros may be queued without a fence.
                self.queue.push(id, vec![first], Until::Synchronised);
                Err(error)
            }
        }
    }
}

/// The stream on which the engine overwrites memory.
fn scrubbing_stream(engine: &Inner) -> Result<Stream> {
    if let Some(stream) = &engine.state.lock().scrubbing {
        return Ok(stream.clone());
    }
    // Two threads may each make one. The second is destroyed again, which calls the driver, without
    // the lock.
    let stream = Stream::new(&engine.device)?;
    let mut state = engine.state.lock();
    let kept = state.scrubbing.get_or_insert_with(|| stream.clone());
    let kept = kept.clone();
    drop(state);
    Ok(kept)
}
