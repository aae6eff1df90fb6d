//! The ranges of an engine, each behind a lock of its own.
//!
//! The order of locks is the engine's, then one range's; nobody holds two ranges' at a time. Whoever makes or gives back
//! memory holds the engine's. What is there already is taken and freed under the range's lock alone, so models that do
//! so write to no cache line in common.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::range::{Range, Remains};
use crate::Result;
use crate::process::Process;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{self, Apart, Arc, Condvar, Mutex, MutexGuard, PoisonError};
use core::cell::Cell;
use core::ops::{Deref, DerefMut};
use core::time::Duration;
use std::collections::BTreeMap;

/// Names a range of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct RangeId(u64);

/// A range by its name and by itself, for its pool.
#[derive(Debug, Clone)]
pub(crate) struct Handle {
    id: RangeId,
    process: Process,
    place: Arc<Apart<Place>>,
}

#[derive(Debug)]
struct Place {
    range: Mutex<Range>,
    /// Whether the range has something for a step to look after; changed under its lock, and asked without, as there may
    /// be many ranges.
    has_news: AtomicBool,
    /// The tokens of its leases have answered.
    answered: Condvar,
}

impl Handle {
    pub(crate) fn id(&self) -> RangeId {
        self.id
    }

    /// Fails in a forked process, where the lock may be held for good.
    pub(super) fn check_process(&self) -> Result<()> {
        self.process.check()
    }

    /// Locks it without the engine, or beside it: what is changed so is told by hand (`changes`).
    pub(super) fn lock(&self) -> MutexGuard<'_, Range> {
        let range = self.place.range.lock();
        range.unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while another thread asks the tokens of the range's leases, but not for long: what they do is not ours.
    pub(super) fn await_answers<'a>(
        &'a self,
        range: MutexGuard<'a, Range>,
    ) -> MutexGuard<'a, Range> {
        let (place, limit) = (&self.place, Duration::from_millis(100));
        let is_asked = |range: &mut Range| range.leases.is_asked_elsewhere();
        sync::wait_timeout_while(&place.answered, &place.range, range, limit, is_asked)
    }

    /// Tells those who wait for the tokens' answers that they are there.
    pub(super) fn tell_answers(&self) {
        self.place.answered.notify_all();
    }

    /// Says whether the range has something for a step to look after, with its lock, after what may have changed that.
    pub(super) fn note(&self, range: &Range) {
        let has_news = range.has_news();
        if self.has_news() != has_news {
            self.place.has_news.store(has_news, Ordering::SeqCst);
        }
    }

    fn has_news(&self) -> bool {
        self.place.has_news.load(Ordering::SeqCst)
    }
}

/// A range that was locked by way of the engine's state. Each mutable access is a change, of which the engine's guard tells.
#[derive(Debug)]
pub(super) struct RangeGuard<'a> {
    range: MutexGuard<'a, Range>,
    is_changed: &'a Cell<bool>,
}

impl RangeGuard<'_> {
    /// The range, for a change that can serve nobody and changes nothing that is owed.
    pub(super) fn quietly(&mut self) -> &mut Range {
        &mut self.range
    }
}

impl Deref for RangeGuard<'_> {
    type Target = Range;

    fn deref(&self) -> &Range {
        &self.range
    }
}

impl DerefMut for RangeGuard<'_> {
    fn deref_mut(&mut self) -> &mut Range {
        self.is_changed.set(true);
        &mut self.range
    }
}

/// The ranges that are open or still hold something, by name.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    by_id: BTreeMap<RangeId, Handle>,
    next: u64,
    /// Whether a range was changed since the engine was locked.
    is_changed: Cell<bool>,
}

impl Ranges {
    pub(super) fn insert(&mut self, range: Range, process: Process) -> Handle {
        let id = RangeId(self.next);
        self.next += 1;
        let place = Arc::new(Apart(Place {
            range: Mutex::new(range),
            has_news: AtomicBool::new(false),
            answered: Condvar::new(),
        }));
        let handle = Handle { id, process, place };
        self.by_id.insert(id, handle.clone());
        handle
    }

    /// Takes a range out that holds no memory any more. What is left of it is to be dropped without a lock: that calls
    /// the driver.
    pub(super) fn remove(&mut self, id: RangeId) -> Option<Remains> {
        let handle = self.by_id.remove(&id)?;
        let remains = handle.lock().end();
        Some(remains)
    }

    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(super) fn handle(&self, id: RangeId) -> Option<&Handle> {
        self.by_id.get(&id)
    }

    /// Locks one range.
    pub(super) fn get(&self, id: RangeId) -> Option<RangeGuard<'_>> {
        self.by_id.get(&id).map(|handle| self.guard(handle))
    }

    fn guard<'a>(&'a self, handle: &'a Handle) -> RangeGuard<'a> {
        RangeGuard {
            range: handle.lock(),
            is_changed: &self.is_changed,
        }
    }

    pub(super) fn is_changed(&self) -> bool {
        self.is_changed.get()
    }

    /// Whether a range was changed since this was asked.
    pub(super) fn take_changed(&mut self) -> bool {
        self.is_changed.take()
    }

    /// The ranges that have something for a step to look after.
    pub(super) fn with_news(&self) -> impl Iterator<Item = &Handle> {
        self.by_id.values().filter(|handle| handle.has_news())
    }

    /// Locks one range after the other, in the order in which they were made.
    pub(super) fn iter(&self) -> impl Iterator<Item = (RangeId, RangeGuard<'_>)> {
        let ranges = self.by_id.iter();
        ranges.map(|(id, handle)| (*id, self.guard(handle)))
    }

    /// As [`iter`](Self::iter), without the names.
    pub(super) fn values(&self) -> impl Iterator<Item = RangeGuard<'_>> {
        self.by_id.values().map(|handle| self.guard(handle))
    }
}
